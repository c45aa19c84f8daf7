//! Which host is to have a machine's backup.

use super::wire::HostState;

/// What a machine takes besides its memory: the program, its log and compiled code.
pub const BESIDES: u64 = 512 << 20;

/// What the machine needs, and where it is.
#[derive(Clone, Debug)]
pub struct Need<'a> {
    pub uuid: &'a str,
    /// Bytes.
    pub memory: u64,
    /// The version of the primary's ftvm.
    pub version: &'a str,
}

/// Why a host cannot have it.
pub fn reason_against(host: &HostState, need: &Need<'_>) -> Option<String> {
    if host.maintenance {
        return Some("it is in maintenance".into());
    }
    if host.version != need.version {
        return Some(format!("it has ftvm {}, not {}", host.version, need.version));
    }
    if host.machines.iter().any(|m| m.runs && m.uuid.eq_ignore_ascii_case(need.uuid)) {
        return Some("the machine runs there".into());
    }
    if host.available < need.memory.saturating_add(BESIDES) {
        return Some(format!(
            "it has {} MiB of memory left; {} MiB are needed",
            host.available >> 20,
            need.memory.saturating_add(BESIDES) >> 20
        ));
    }
    None
}

/// How busy a host would be with it; less is better. A processor in use weighs as much as all of the memory; machines
/// that were started just now are not yet in the load of the last minute.
fn burden(host: &HostState, need: &Need<'_>) -> f64 {
    let processors = f64::from(host.processors.max(1));
    let runs = host.machines.iter().filter(|m| m.runs).count() as f64;
    let memory = (need.memory + BESIDES) as f64 / host.available.max(1) as f64;
    host.load.max(runs * 0.25) / processors + memory
}

/// The hosts that can have it, the best one first.
pub fn order(hosts: Vec<HostState>, need: &Need<'_>) -> Vec<HostState> {
    let mut fit: Vec<_> = hosts.into_iter().filter(|h| reason_against(h, need).is_none()).collect();
    fit.sort_by(|a, b| burden(a, need).total_cmp(&burden(b, need)).then_with(|| a.name.cmp(&b.name)));
    fit
}

#[cfg(test)]
mod tests {
    use super::super::wire::MachineState;
    use super::*;

    fn host(name: &str, load: f64, available_gib: u64) -> HostState {
        HostState {
            language: 1,
            name: name.into(),
            service: String::new(),
            version: "1".into(),
            features: Vec::new(),
            processors: 2,
            load,
            memory: 64 << 30,
            available: available_gib << 30,
            maintenance: false,
            machines: Vec::new(),
        }
    }

    fn names(hosts: Vec<HostState>) -> Vec<String> {
        let need = Need { uuid: "U", memory: 1 << 30, version: "1" };
        order(hosts, &need).into_iter().map(|h| h.name).collect()
    }

    #[test]
    fn the_idle_host_before_the_busy_one_and_the_roomy_one_before_the_full_one() {
        assert_eq!(names(vec![host("a", 2.0, 32), host("b", 0.1, 32)]), ["b", "a"]);
        assert_eq!(names(vec![host("a", 0.1, 2), host("b", 0.1, 32)]), ["b", "a"]);
        assert_eq!(names(vec![host("b", 0.0, 32), host("a", 0.0, 32)]), ["a", "b"]);
    }

    #[test]
    fn a_host_that_cannot_have_it_is_none() {
        let machine = |runs| MachineState {
            name: "m".into(),
            uuid: "u".into(),
            runs,
            role: "backup".into(),
            state: "following".into(),
            memory: 0,
        };
        let mut runs = host("runs", 0.0, 32);
        runs.machines.push(machine(true));
        let mut defined = host("defined", 1.0, 32);
        defined.machines.push(machine(false));
        let mut closed = host("closed", 0.0, 32);
        closed.maintenance = true;
        let mut old = host("old", 0.0, 32);
        old.version = "0".into();
        assert_eq!(names(vec![runs, defined, closed, old, host("full", 0.0, 1)]), ["defined"]);
    }
}
