//! Etcd, of Debian's package, with a member on each of a network's hosts.

use std::process::Stdio;

use crate::hosts::Network;
use crate::service::Process;
use crate::storage::{Kind, Server};
use crate::{Result, Scratch};

/// The members; ended when dropped.
pub struct Etcd {
    /// By the number of their host.
    pub members: Vec<Process>,
    /// Where clients find them.
    pub urls: Vec<String>,
}

impl Etcd {
    /// Why etcd cannot be had here, if so.
    pub fn unavailable() -> Option<String> {
        Server::unavailable(Kind::Etcd)
    }

    /// Start `count` members, on hosts 0, 1, ... `tls`: a directory with `etcd.crt`, `etcd.key` and `ca.crt`; clients must
    /// show a certificate of the same authority then.
    pub fn start(net: &Network, scratch: &Scratch, count: usize, tls: Option<&str>) -> Result<Etcd> {
        let addresses: Vec<String> = (0..count).map(Network::address).collect();
        let peers: Vec<String> =
            addresses.iter().enumerate().map(|(i, a)| format!("m{i}=http://{a}:2380")).collect();
        let scheme = if tls.is_some() { "https" } else { "http" };
        let mut members = Vec::new();
        for (i, address) in addresses.iter().enumerate() {
            let (data, log) = (scratch.path(&format!("etcd{i}")), scratch.path(&format!("etcd{i}.log")));
            let log = std::fs::File::create(log).map_err(|e| e.to_string())?;
            let mut command = net.on_host(i, "etcd");
            command
                .args(["--name", &format!("m{i}"), "--data-dir", &data, "--log-level", "error"])
                .args(["--listen-client-urls", &format!("{scheme}://{address}:2379")])
                .args(["--advertise-client-urls", &format!("{scheme}://{address}:2379")])
                .args(["--listen-peer-urls", &format!("http://{address}:2380")])
                .args(["--initial-advertise-peer-urls", &format!("http://{address}:2380")])
                .args(["--initial-cluster", &peers.join(","), "--initial-cluster-state", "new"]);
            if let Some(tls) = tls {
                command
                    .args([
                        "--cert-file",
                        &format!("{tls}/etcd.crt"),
                        "--key-file",
                        &format!("{tls}/etcd.key"),
                    ])
                    .args(["--client-cert-auth", "--trusted-ca-file", &format!("{tls}/ca.crt")]);
            }
            let child = command
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(log)
                .spawn()
                .map_err(|e| format!("etcd: {e}"))?;
            members.push(Process(child));
        }
        let urls = addresses.iter().map(|a| format!("{scheme}://{a}:2379")).collect();
        Ok(Etcd { members, urls })
    }

    /// The URL of a lock in it.
    pub fn lock_url(&self, key: &str) -> String {
        let hosts: Vec<&str> =
            self.urls.iter().filter_map(|u| u.split_once("://")).map(|(_, host)| host).collect();
        format!("etcd://{}/{key}", hosts.join(","))
    }
}
