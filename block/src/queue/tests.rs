use super::*;
use std::sync::atomic::AtomicU64;
use std::sync::mpsc::{channel, Receiver};

/// An image in memory whose requests take their time; counts what happens.
struct Slow {
    data: Mutex<Vec<u8>>,
    flushes: Arc<AtomicU64>,
    at_once: AtomicU64,
    most: Arc<AtomicU64>,
    /// Reads of the last sector wait for this.
    gate: Mutex<Option<Receiver<()>>>,
}

const GATED: u64 = (1 << 20) - 512;

impl Slow {
    fn busy(&self) {
        let now = self.at_once.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(now, Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(2));
        self.at_once.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Image for Slow {
    fn size(&self) -> u64 {
        1 << 20
    }
    fn read_only(&self) -> bool {
        false
    }
    fn format(&self) -> &'static str {
        "raw"
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        let gate = self.gate.lock().unwrap().take_if(|_| offset == GATED);
        match gate {
            Some(gate) => gate.recv().unwrap(),
            None => self.busy(),
        }
        let at = offset as usize;
        buf.copy_from_slice(&self.data.lock().unwrap()[at..at + buf.len()]);
        Ok(())
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        self.busy();
        let at = offset as usize;
        self.data.lock().unwrap()[at..at + data.len()].copy_from_slice(data);
        Ok(())
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<(), BlockError> {
        Err(BlockError::ReadOnly)
    }
    fn discard(&self, _: u64, _: u64) -> Result<(), BlockError> {
        Ok(())
    }
    fn flush(&self) -> Result<(), BlockError> {
        std::thread::sleep(Duration::from_millis(5));
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

type Counters = (Arc<AtomicU64>, Arc<AtomicU64>);

fn start(durable: bool) -> (Queue, Receiver<Done>, Counters) {
    start_gated(durable, None)
}

fn start_gated(durable: bool, gate: Option<Receiver<()>>) -> (Queue, Receiver<Done>, Counters) {
    let counters: Counters = Default::default();
    let image = Slow {
        data: Mutex::new(vec![0; 1 << 20]),
        flushes: Arc::clone(&counters.0),
        at_once: AtomicU64::new(0),
        most: Arc::clone(&counters.1),
        gate: Mutex::new(gate),
    };
    let (send, receive) = channel();
    let settings = Settings { durable, ..Settings::default() };
    let done = move |d| {
        let _ = send.send(d);
    };
    (Queue::start("t", Box::new(image), settings, Box::new(done)).unwrap(), receive, counters)
}

#[test]
fn requests_on_the_same_bytes_keep_their_order_and_others_run_side_by_side() {
    let (queue, done, (_, most)) = start(false);
    let mut id = 0;
    let mut submit = |request| {
        id += 1;
        queue.submit(id, request);
        id
    };
    let mut expected = Vec::new();
    for round in 1..=20u8 {
        for slot in 0..8u64 {
            submit(Request::Write { offset: slot * 4096, data: vec![round; 4096] });
            let read = submit(Request::Read { offset: slot * 4096 + 512, len: 512 });
            expected.push((read, round));
        }
    }
    let mut results = std::collections::HashMap::new();
    for _ in 0..id {
        let d = done.recv_timeout(Duration::from_secs(20)).unwrap();
        results.insert(d.id, d.result.unwrap());
    }
    for (id, round) in expected {
        assert_eq!(results[&id], vec![round; 512]);
    }
    assert!(most.load(Ordering::SeqCst) > 4, "they ran one after the other");
}

#[test]
fn durable_writes_share_flushes() {
    let (queue, done, (flushes, _)) = start(true);
    for id in 0..64 {
        queue.submit(id, Request::Write { offset: id * 4096, data: vec![1; 4096] });
    }
    for _ in 0..64 {
        done.recv_timeout(Duration::from_secs(20)).unwrap().result.unwrap();
    }
    let n = flushes.load(Ordering::SeqCst);
    assert!((1..=16).contains(&n), "{n} flushes for 64 writes");
    // Nothing was written since: a flush has nothing to do.
    queue.submit(64, Request::Flush);
    done.recv_timeout(Duration::from_secs(20)).unwrap().result.unwrap();
    assert_eq!(flushes.load(Ordering::SeqCst), n);
}

#[test]
fn what_is_abandoned_is_not_told_of() {
    let (queue, done, _) = start(true);
    for id in 0..100 {
        queue.submit(id, Request::Write { offset: 0, data: vec![1; 512] });
    }
    queue.abandon();
    let told = done.try_iter().count();
    drop(queue);
    assert!(told + done.iter().count() < 100);
}

#[test]
fn a_thread_looks_out_for_the_next_request_but_not_for_long() {
    let (queue, done, _) = start(false);
    for id in 0..20 {
        queue.submit(id, Request::Flush);
        assert_eq!(done.recv_timeout(Duration::from_secs(20)).unwrap().id, id);
    }
    // However it was woken, at the end it sleeps, and later requests do not keep it awake.
    for id in 20..24 {
        std::thread::sleep(Duration::from_millis(50));
        let state = queue.inner.lock();
        assert!(!state.on_lookout && state.lookout <= LOOKOUT);
        assert_eq!(state.idle.len(), state.threads.len());
        drop(state);
        queue.submit(id, Request::Flush);
        assert_eq!(queue.inner.lock().lookout, Duration::ZERO);
        assert_eq!(done.recv_timeout(Duration::from_secs(20)).unwrap().id, id);
    }
}

#[test]
fn a_long_request_among_quick_ones_does_not_keep_them_waiting() {
    let (open, gate) = channel();
    let (queue, done, _) = start_gated(false, Some(gate));
    for id in 0..8 {
        queue.submit(id, Request::Read { offset: id * 512, len: 512 });
    }
    for _ in 0..8 {
        done.recv_timeout(Duration::from_secs(20)).unwrap();
    }
    queue.inner.lock().haste = Haste(QUICK_MOST);
    queue.submit(100, Request::Read { offset: GATED, len: 512 });
    for id in 0..8 {
        queue.submit(id, Request::Read { offset: id * 512, len: 512 });
    }
    let mut ended: Vec<u64> =
        (0..8).map(|_| done.recv_timeout(Duration::from_secs(20)).unwrap().id).collect();
    ended.sort_unstable();
    assert_eq!(ended, (0..8).collect::<Vec<_>>());
    assert!(!queue.inner.lock().haste.is_quick());
    open.send(()).unwrap();
    let long = done.recv_timeout(Duration::from_secs(20)).unwrap();
    assert_eq!((long.id, long.result.unwrap().len()), (100, 512));
}

#[test]
fn an_account_is_kept_of_quick_requests() {
    let mut haste = Haste::default();
    (0..QUICK_FROM - 1).for_each(|_| haste.note(Duration::from_micros(10)));
    assert!(!haste.is_quick());
    haste.note(QUICK);
    assert!(haste.is_quick());
    // A thread that was held up now and then changes nothing, a disk that is read from does.
    for n in 0..10_000 {
        haste.note(Duration::from_micros(if n % 32 == 0 { 120 } else { 10 }));
        assert!(n < 100 || haste.is_quick(), "{n}");
    }
    haste.note(Duration::from_millis(2));
    assert!(!haste.is_quick());
    haste.note(Duration::MAX);
    (0..10_000).for_each(|n| haste.note(Duration::from_micros(if n % 32 == 0 { 2000 } else { 10 })));
    assert!(!haste.is_quick());
}
