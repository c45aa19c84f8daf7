//! I/O limits (`throttling.*`): QEMU's leaky buckets (its `docs/throttle.txt`).
//!
//! A bucket loses `average` units a second. A request waits while the bucket is fuller than its capacity, and
//! then pours its own units in.

use std::time::{Duration, Instant};

/// One limit: units a second, and the burst that is let through (`*-max`); 0: no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Limit {
    pub average: u64,
    pub max: u64,
    /// Seconds that a burst at `max` may last (`*-max-length`); 0 stands for 1.
    pub length: u64,
}

/// All limits of a drive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Limits {
    /// Bytes: total, read, write.
    pub bytes: [Limit; 3],
    /// Requests: total, read, write.
    pub requests: [Limit; 3],
    /// A request of more bytes than this counts as several; 0: each is one.
    pub request_size: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    limit: Limit,
    level: f64,
}

impl Bucket {
    fn capacity(&self) -> f64 {
        if self.limit.max > 0 {
            (self.limit.max * self.limit.length.max(1)) as f64
        } else {
            // A tenth of a second's worth, as QEMU.
            self.limit.average as f64 / 10.0
        }
    }
    fn leak(&mut self, seconds: f64) {
        self.level = (self.level - self.limit.average as f64 * seconds).max(0.0);
    }
    fn wait(&self) -> f64 {
        if self.limit.average == 0 {
            return 0.0;
        }
        ((self.level - self.capacity()) / self.limit.average as f64).max(0.0)
    }
}

/// The state of a drive's limits.
#[derive(Clone, Debug, Default)]
pub struct Throttle {
    limits: Limits,
    bytes: [Bucket; 3],
    requests: [Bucket; 3],
    last: Option<Instant>,
}

impl Throttle {
    /// Empty buckets for `limits`.
    pub fn new(limits: Limits) -> Self {
        let bucket = |limit| Bucket { limit, level: 0.0 };
        Throttle {
            limits,
            bytes: limits.bytes.map(bucket),
            requests: limits.requests.map(bucket),
            last: None,
        }
    }

    /// Let a request pass (`None`), or say how long it must wait before it asks again.
    pub fn take(&mut self, write: bool, len: u64, now: Instant) -> Option<Duration> {
        if self.limits == Limits::default() {
            return None;
        }
        let seconds = self.last.map_or(0.0, |l| now.saturating_duration_since(l).as_secs_f64());
        self.last = Some(now);
        let which = [0, if write { 2 } else { 1 }];
        for bucket in self.bytes.iter_mut().chain(&mut self.requests) {
            bucket.leak(seconds);
        }
        let wait = which.iter().flat_map(|i| [self.bytes[*i].wait(), self.requests[*i].wait()]);
        let wait = wait.fold(0.0, f64::max);
        if wait > 0.0 {
            return Some(Duration::from_secs_f64(wait.clamp(1e-4, 1.0)));
        }
        let count = match self.limits.request_size {
            0 => 1,
            size => len.div_ceil(size).max(1),
        };
        for i in which {
            self.bytes[i].level += len as f64;
            self.requests[i].level += count as f64;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn served(limits: Limits, len: u64, seconds: u64) -> u64 {
        let mut throttle = Throttle::new(limits);
        let (mut now, mut n) = (Instant::now(), 0);
        let end = now + Duration::from_secs(seconds);
        while now < end {
            match throttle.take(true, len, now) {
                None => n += 1,
                Some(wait) => now += wait,
            }
        }
        n
    }

    #[test]
    fn the_average_is_kept_and_a_burst_let_through() {
        let ops = |average, max| Limits {
            requests: [Limit { average, max, length: 0 }, Limit::default(), Limit::default()],
            ..Limits::default()
        };
        let n = served(ops(100, 0), 4096, 10);
        assert!((1000..=1020).contains(&n), "{n}");
        let n = served(ops(100, 500), 4096, 10);
        assert!((1490..=1510).contains(&n), "{n}");
        let bytes = Limits {
            bytes: [Limit { average: 1 << 20, max: 0, length: 0 }, Limit::default(), Limit::default()],
            ..Limits::default()
        };
        let n = served(bytes, 65536, 10);
        assert!((160..=163).contains(&n), "{n}");
        let sized = Limits { request_size: 4096, ..ops(100, 0) };
        let n = served(sized, 16384, 10);
        assert!((250..=256).contains(&n), "{n}");
    }
}
