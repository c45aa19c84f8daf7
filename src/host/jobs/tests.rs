use super::*;

/// Copies nothing, a million times.
struct Endless {
    ready: bool,
    ended: Arc<Mutex<Vec<End>>>,
}

impl Work for Endless {
    fn step(&mut self) -> Result<Step, BlockError> {
        std::thread::sleep(Duration::from_millis(1));
        Ok(if self.ready { Step::Ready } else { Step::More(1) })
    }
    fn progress(&self) -> (u64, u64) {
        (1, 2)
    }
}

impl Body for Endless {
    fn end(&mut self, end: End) -> Result<(), String> {
        lock(&self.ended).push(end);
        Ok(())
    }
}

fn wanted(id: &str, auto: bool) -> Wanted {
    Wanted {
        id: id.into(),
        kind: "mirror",
        auto_finalize: auto,
        auto_dismiss: auto,
        speed: 0,
        stop_on_error: false,
        nodes: Vec::new(),
    }
}

fn start(jobs: &Jobs, id: &str, auto: bool, ready: bool) -> Arc<Mutex<Vec<End>>> {
    let ended = Arc::default();
    let body = Endless { ready, ended: Arc::clone(&ended) };
    jobs.start(wanted(id, auto), &EventSink::default(), Box::new(body)).unwrap();
    ended
}

fn until(jobs: &Jobs, id: &str, status: Option<Status>) {
    for _ in 0..2000 {
        if jobs.find(id).map(|j| j.state().status) == status {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("{id} does not come to {status:?}");
}

#[test]
fn a_job_ends_as_it_is_told() {
    let jobs = Jobs::default();
    let ended = start(&jobs, "a", true, true);
    until(&jobs, "a", Some(Status::Ready));
    assert!(jobs
        .start(
            wanted("a", true),
            &EventSink::default(),
            Box::new(Endless { ready: true, ended: Arc::default() })
        )
        .is_err());
    assert!(matches!(jobs.dismiss("a"), Err(Refused::State(Status::Ready))));
    assert!(jobs.complete("a").is_ok());
    until(&jobs, "a", None);
    assert_eq!(*lock(&ended), [End::Complete]);
    // Cancelled when ready: it ends well, without the switch; with force, badly.
    for (force, end) in [(false, End::Stop), (true, End::Abort)] {
        let ended = start(&jobs, "b", true, true);
        until(&jobs, "b", Some(Status::Ready));
        assert!(jobs.cancel("b", force).is_ok());
        until(&jobs, "b", None);
        assert_eq!(*lock(&ended), [end]);
    }
    assert!(matches!(jobs.cancel("b", true), Err(Refused::NoSuchJob)));
}

#[test]
fn a_job_waits_to_be_settled_and_dismissed() {
    let jobs = Jobs::default();
    let ended = start(&jobs, "a", false, true);
    until(&jobs, "a", Some(Status::Ready));
    assert!(jobs.pause("a", true).is_ok());
    until(&jobs, "a", Some(Status::Standby));
    assert!(matches!(jobs.pause("a", true), Err(Refused::Paused(true))));
    assert!(jobs.pause("a", false).is_ok());
    until(&jobs, "a", Some(Status::Ready));
    assert!(jobs.complete("a").is_ok());
    until(&jobs, "a", Some(Status::Pending));
    assert!(lock(&ended).is_empty());
    assert!(jobs.finalize("a").is_ok());
    until(&jobs, "a", Some(Status::Concluded));
    assert_eq!(*lock(&ended), [End::Complete]);
    assert!(jobs.dismiss("a").is_ok());
    assert!(jobs.find("a").is_none());
    // One that is not ready cannot be completed; the end of the machine ends all.
    let ended = start(&jobs, "b", false, false);
    until(&jobs, "b", Some(Status::Running));
    assert!(matches!(jobs.complete("b"), Err(Refused::NotReady)));
    assert!(jobs.is_busy());
    jobs.close();
    assert_eq!(*lock(&ended), [End::Abort]);
    assert!(!jobs.is_busy());
}
