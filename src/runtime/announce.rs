//! A machine that has come to this host tells the network so.

use std::sync::Arc;
use std::time::Duration;

use ftvm_devices::Output;

use super::live::Runtime;
use crate::host::backends::Nic;
use crate::host::Outside;

/// A card's number, its MAC address and, where it is known, its IP address.
pub type Card = (u32, [u8; 6], Option<[u8; 4]>);

/// Tell the switches (and neighbours) where the machine's MAC addresses are now: at once, and again after each of `pauses`.
pub fn announce(outside: &Arc<Outside>, cards: &[Card], pauses: Vec<Duration>) {
    let mut frames = Vec::new();
    for (nic, mac, ip) in cards {
        frames.push((*nic, ftvm_net::rarp_announcement(*mac)));
        if let Some(ip) = ip {
            frames.push((*nic, ftvm_net::gratuitous_arp(*mac, *ip)));
        }
    }
    let send = |outside: &Outside, frames: &[(u32, Vec<u8>)]| {
        for (nic, frame) in frames {
            outside.perform(Output::NetTx { nic: *nic, frame: frame.clone() });
        }
    };
    send(outside, &frames);
    let outside = Arc::clone(outside);
    let _ = std::thread::Builder::new().name("announce".into()).spawn(move || {
        for pause in pauses {
            std::thread::sleep(pause);
            send(&outside, &frames);
        }
    });
}

/// The pauses that QEMU's announce parameters describe (milliseconds).
pub fn pauses(initial: u64, step: u64, max: u64, rounds: u64) -> Vec<Duration> {
    (0..rounds.saturating_sub(1)).map(|n| Duration::from_millis((initial + n * step).min(max))).collect()
}

impl Runtime {
    /// Announce every card, as the migration's parameters say.
    pub fn announce(&self) {
        let p = self.shared.migration.state().parameters.clone();
        let pauses = pauses(p.announce_initial, p.announce_step, p.announce_max, p.announce_rounds);
        self.announce_cards(None, pauses);
    }

    /// Announce the cards on these network back ends, or all.
    pub fn announce_cards(&self, only: Option<&[String]>, pauses: Vec<Duration>) {
        let nics = self.shared.backends().nics.clone();
        let card = |(i, nic): (usize, Option<Nic>)| {
            let nic = nic.filter(|n| only.is_none_or(|names| names.contains(&n.netdev)))?;
            Some((i as u32, nic.mac, None))
        };
        let cards: Vec<Card> = nics.into_iter().enumerate().filter_map(card).collect();
        announce(&self.outside, &cards, pauses);
    }
}
