//! A drive's queue: requests that have left the machine, and their ends on the way back to it.

use std::sync::mpsc::Sender;

use ftvm_block::queue::{Done, Settings};
use ftvm_block::{Image, Queue, Request};
use ftvm_devices::{DiskOp, Input};

use crate::machine::MachineInput;
use crate::runtime::Event;

/// A request that failed; the drive's policy says what the guest sees of it.
#[derive(Debug)]
pub struct DiskFailure {
    pub drive: u32,
    pub id: u64,
    pub op: DiskOp,
    pub errno: i32,
    pub reason: String,
}

/// A drive's queue and threads.
pub struct DiskWorker(Queue);

impl DiskWorker {
    /// Start serving `image` as drive `index`.
    pub fn start(
        index: usize,
        name: &str,
        image: Box<dyn Image>,
        settings: Settings,
        events: Sender<Event>,
    ) -> std::io::Result<Self> {
        let drive = index as u32;
        let done = move |done: Done| {
            let Done { id, mut request, result } = done;
            if let (Request::Write { data, .. }, true) = (&mut request, result.is_ok()) {
                ftvm_block::buffers::give(std::mem::take(data));
            }
            let event = match result {
                Ok(data) => Event::Input(MachineInput::Device(Input::DiskDone { id, result: Ok(data) })),
                Err(e) => Event::DiskFailed(DiskFailure {
                    drive,
                    id,
                    op: op(request),
                    errno: e.errno(),
                    reason: e.to_string(),
                }),
            };
            let _ = events.send(event);
        };
        Queue::start(name, image, settings, Box::new(done)).map(DiskWorker)
    }

    /// Queue a request.
    pub fn submit(&self, id: u64, op: DiskOp) {
        self.0.submit(id, request(op));
    }

    /// Throw away what is queued and everything submitted from now on.
    pub fn abandon(&self) {
        self.0.abandon();
    }
}

fn request(op: DiskOp) -> Request {
    match op {
        DiskOp::Read { offset, len } => Request::Read { offset, len },
        DiskOp::Write { offset, data } => Request::Write { offset, data },
        DiskOp::Flush => Request::Flush,
        DiskOp::Discard { offset, len } => Request::Discard { offset, len },
        DiskOp::WriteZeroes { offset, len, may_unmap } => Request::WriteZeroes { offset, len, may_unmap },
    }
}

fn op(request: Request) -> DiskOp {
    match request {
        Request::Read { offset, len } => DiskOp::Read { offset, len },
        Request::Write { offset, data } => DiskOp::Write { offset, data },
        Request::Flush => DiskOp::Flush,
        Request::Discard { offset, len } => DiskOp::Discard { offset, len },
        Request::WriteZeroes { offset, len, may_unmap } => DiskOp::WriteZeroes { offset, len, may_unmap },
    }
}
