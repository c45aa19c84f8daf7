//! Network back ends: where a guest's frames go.

use std::time::Duration;

mod error;
pub mod tap;
pub mod user;

pub use error::NetError;

/// What is done with a frame that arrives; called on the back end's own thread.
pub type Receive = Box<dyn FnMut(Vec<u8>) + Send>;

/// A network back end. Frames are Ethernet frames without FCS.
pub trait Backend: Send {
    /// Send a frame; what cannot be sent is dropped, as on a wire.
    fn send(&mut self, frame: &[u8]);

    /// Serve it on the caller's thread from here on, if its own is not just doing so: adds what is to be waited for to
    /// `list`, and returns for how long at most. Then [`Self::serve`] is called with the whole list, and all of it again.
    fn attend(&mut self, _list: &mut Vec<libc::pollfd>) -> Option<Duration> {
        None
    }

    /// Do what the descriptors in `list` are ready for, and what is due. Frames that arrive are received here.
    fn serve(&mut self, _list: &[libc::pollfd]) {}

    /// Its own thread serves it again.
    fn leave(&mut self) {}
}

/// The RARP frame (RFC 903 request reverse) that tells switches where a MAC address is now.
pub fn rarp_announcement(mac: [u8; 6]) -> Vec<u8> {
    let mut f = vec![0xFF; 6];
    f.extend(mac);
    f.extend([0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    f.extend(mac);
    f.extend([0; 4]);
    f.extend(mac);
    f.extend([0; 4]);
    f.resize(60, 0);
    f
}

/// A gratuitous ARP request for an IPv4 address that the guest was seen to use.
pub fn gratuitous_arp(mac: [u8; 6], ip: [u8; 4]) -> Vec<u8> {
    let mut f = vec![0xFF; 6];
    f.extend(mac);
    f.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    f.extend(mac);
    f.extend(ip);
    f.extend([0; 6]);
    f.extend(ip);
    f.resize(60, 0);
    f
}

#[cfg(test)]
mod tests {
    #[test]
    fn announcements_are_whole_broadcast_frames() {
        let mac = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
        for f in [super::rarp_announcement(mac), super::gratuitous_arp(mac, [10, 0, 0, 1])] {
            assert_eq!(f.len(), 60);
            assert_eq!(f[..6], [0xFF; 6]);
            assert_eq!(f[6..12], mac);
        }
    }
}
