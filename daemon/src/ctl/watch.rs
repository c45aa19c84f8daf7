//! What changes: a live view, and the events one a line.

use std::collections::VecDeque;
use std::io::IsTerminal;
use std::time::Duration;

use futures_lite::{future::block_on, StreamExt};
use serde_json::{json, Value};

use super::client::{arguments, Client};
use super::{plain, print};
use crate::{BUS_NAME, ROOT};

/// How many values a sparkline shows.
const WIDTH: usize = 48;
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// Values as bars between 0 and their largest.
fn sparkline(values: &VecDeque<f64>) -> String {
    let top = values.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
    let bar = |v: &f64| BARS[((v.max(0.0) / top * 7.0).round() as usize).min(7)];
    values.iter().map(bar).collect()
}

/// A live view of a machine, until the program is interrupted.
fn status_view(now: &Value, history: &mut [(&'static str, &'static str, VecDeque<f64>); 3]) -> String {
    let text = |key: &str| plain(&now[key]);
    let mut out = format!("{}  {}  process {}\n", text("name"), text("state"), text("pid"));
    out += &format!("{}  {}  peer {}\n", text("role"), text("ft-state"), text("peer"));
    for (key, unit, values) in history {
        values.push_back(now[*key].as_f64().unwrap_or(0.0));
        if values.len() > WIDTH {
            values.pop_front();
        }
        let last = values.back().copied().unwrap_or(0.0);
        out += &format!("{key:<17} {last:>9.2} {unit:<7} {}\n", sparkline(values));
    }
    if let Some(last) = now["last-failover"].as_object().filter(|l| !l.is_empty()) {
        let words: Vec<String> = last.iter().map(|(k, v)| format!("{k} {}", plain(v))).collect();
        out += &format!("last failover     {}\n", words.join(", "));
    }
    out
}

pub fn status(client: &Client, machine: &str) -> Result<(), String> {
    let terminal = std::io::stdout().is_terminal();
    let mut history = [
        ("lag-ms", "ms", VecDeque::new()),
        ("log-mbps", "Mbit/s", VecDeque::new()),
        ("throttle-percent", "%", VecDeque::new()),
    ];
    loop {
        let view = status_view(&super::status(client, machine)?, &mut history);
        // To the top left, and nothing below: the view is drawn over the one before.
        let clear = if terminal { "\x1b[H\x1b[J" } else { "" };
        print(&format!("{clear}{view}"))?;
        std::thread::sleep(Duration::from_millis(500));
    }
}

/// Signals and changed properties, one a line, until the program is interrupted.
pub fn events(client: &Client, name: Option<&str>, json: bool) -> Result<(), String> {
    let only = name.map(|n| client.find(n)).transpose()?;
    let text = |e: zbus::Error| e.to_string();
    block_on(async {
        let rule = zbus::MatchRule::builder()
            .msg_type(zbus::message::Type::Signal)
            .sender(BUS_NAME)
            .path_namespace(ROOT)
            .build()
            .map_err(text)?;
        let mut stream =
            zbus::MessageStream::for_match_rule(rule, &client.connection, None).await.map_err(text)?;
        while let Some(message) = stream.next().await {
            let message = message.map_err(text)?;
            let header = message.header();
            let path = header.path().map_or("", |p| p.as_str());
            if only.as_deref().is_some_and(|o| o != path) {
                continue;
            }
            let member = header.member().map_or("", |m| m.as_str());
            let machine = path.rsplit('/').next().unwrap_or_default();
            let arguments = Value::Array(arguments(&message));
            let line = match json {
                true => json!({"object": path, "signal": member, "arguments": arguments}).to_string(),
                false => format!("{machine} {member} {arguments}"),
            };
            print(&line)?;
        }
        Err("the bus: the connection was closed".to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_grow_with_their_values() {
        assert_eq!(sparkline(&VecDeque::from([0.0, 1.0, 3.5, 7.0])), "▁▂▅█");
        assert_eq!(sparkline(&VecDeque::from([0.0, 0.0])), "▁▁");
    }

    #[test]
    fn the_view_shows_the_pair() {
        let now = json!({"name": "web", "state": "running", "pid": 7, "role": "primary", "ft-state": "protected",
            "peer": "10.0.0.2:8100", "lag-ms": 12.5, "log-mbps": 0.25, "throttle-percent": 0.0,
            "last-failover": {"reason": "silence"}});
        let mut history = [
            ("lag-ms", "ms", VecDeque::new()),
            ("log-mbps", "Mbit/s", VecDeque::new()),
            ("throttle-percent", "%", VecDeque::new()),
        ];
        let view = status_view(&now, &mut history);
        for part in ["web  running", "primary  protected  peer 10.0.0.2:8100", "12.50 ms", "reason silence"] {
            assert!(view.contains(part), "{part}: {view}");
        }
    }
}
