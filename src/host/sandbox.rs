//! `-sandbox on`: system calls that the program does not need are refused by the kernel (seccomp), so that a guest that
//! breaks out of its machine finds little. A refused call fails with EPERM.

use crate::cli::keyval::{KeyvalError, Params};

/// Which groups of system calls are refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sandbox {
    obsolete: bool,
    elevate: bool,
    /// Only programs that this one starts may not gain privileges.
    elevate_children: bool,
    spawn: bool,
    resources: bool,
}

/// What no program of today calls, or what only administers a host.
const ALWAYS: &[i64] = &[
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_syslog,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_kexec_load,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_acct,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_ptrace,
    libc::SYS_bpf,
];
const OBSOLETE: &[i64] =
    &[libc::SYS__sysctl, libc::SYS_uselib, libc::SYS_ustat, libc::SYS_sysfs, libc::SYS_vserver];
const ELEVATE: &[i64] = &[
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_setgroups,
];
const SPAWN: &[i64] = &[libc::SYS_fork, libc::SYS_vfork, libc::SYS_execve, libc::SYS_execveat];
const RESOURCES: &[i64] = &[
    libc::SYS_setpriority,
    libc::SYS_sched_setparam,
    libc::SYS_sched_setscheduler,
    libc::SYS_sched_setaffinity,
];

const LOAD_WORD: u16 = 0x20;
const JUMP_IF_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;
const ALLOW: u32 = 0x7FFF_0000;
const FAIL: u32 = 0x0005_0000;
/// AUDIT_ARCH_X86_64.
const ARCHITECTURE: u32 = 0xC000_003E;

impl Sandbox {
    /// From `-sandbox`; `None`: off.
    pub fn parse(p: &Params) -> Result<Option<Sandbox>, KeyvalError> {
        let denied = |key: &str| Ok::<bool, KeyvalError>(p.choice(key, &["allow", "deny"])? == Some("deny"));
        let elevate = p.choice("elevateprivileges", &["allow", "deny", "children"])?;
        let sandbox = Sandbox {
            // As in QEMU, obsolete calls are refused unless they are allowed.
            obsolete: p.choice("obsolete", &["allow", "deny"])? != Some("allow"),
            elevate: elevate == Some("deny"),
            elevate_children: elevate == Some("children"),
            spawn: denied("spawn")?,
            resources: denied("resourcecontrol")?,
        };
        Ok((p.bool("enable")? == Some(true)).then_some(sandbox))
    }

    fn calls(&self) -> Vec<i64> {
        let groups = [
            (true, ALWAYS),
            (self.obsolete, OBSOLETE),
            (self.elevate, ELEVATE),
            (self.spawn, SPAWN),
            (self.resources, RESOURCES),
        ];
        groups.iter().filter(|(on, _)| *on).flat_map(|(_, calls)| calls.iter().copied()).collect()
    }

    /// Refuse the calls in this thread and all that it starts from now on, or in `all` threads of the program.
    pub fn enter(&self, all: bool) -> std::io::Result<()> {
        let op = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
        let mut filter = vec![
            // Another architecture's numbers mean other calls.
            op(LOAD_WORD, 0, 0, 4),
            op(JUMP_IF_EQUAL, 1, 0, ARCHITECTURE),
            op(RETURN, 0, 0, FAIL | libc::EPERM as u32),
            op(LOAD_WORD, 0, 0, 0),
        ];
        for call in self.calls() {
            filter.push(op(JUMP_IF_EQUAL, 0, 1, call as u32));
            filter.push(op(RETURN, 0, 0, FAIL | libc::EPERM as u32));
        }
        filter.push(op(RETURN, 0, 0, ALLOW));
        let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
        if self.elevate || self.elevate_children || !nix::unistd::geteuid().is_root() {
            // SAFETY: this option takes only numbers.
            if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
        let flags = if all { libc::SECCOMP_FILTER_FLAG_TSYNC } else { 0 };
        let mode = libc::SECCOMP_SET_MODE_FILTER;
        // SAFETY: the program and its filter live across the call, which copies them.
        let done = unsafe { libc::syscall(libc::SYS_seccomp, mode, flags, std::ptr::from_ref(&program)) };
        if done != 0 {
            return Err(std::io::Error::last_os_error());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_call_fails_and_others_go_on() {
        let p = Params::parse("on,spawn=deny,resourcecontrol=deny", Some("enable")).unwrap();
        let sandbox = Sandbox::parse(&p).unwrap().unwrap();
        std::thread::spawn(move || {
            sandbox.enter(false).unwrap();
            assert!(std::process::Command::new("/bin/true").status().is_err(), "a program was started");
            assert!(std::thread::spawn(|| 7).join().is_ok(), "no thread could be started");
            assert!(std::fs::read("/proc/self/status").is_ok());
        })
        .join()
        .unwrap();
        let off = Params::parse("off", Some("enable")).unwrap();
        assert_eq!(Sandbox::parse(&off).unwrap(), None);
    }
}
