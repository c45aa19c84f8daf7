//! Network back ends: where a guest's frames go.

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
