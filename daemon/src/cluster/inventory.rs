//! The shared inventory: each host keeps a key in etcd while it lives, by a lease. Hosts find each other there; how a
//! host is, and what it is asked, they still learn from each other. While etcd does not answer, nothing is forgotten.

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{
    Certificate, Client, ConnectOptions, GetOptions, Identity, LeaseGrantOptions, PutOptions, TlsOptions,
};

use super::wire::HostState;
use super::Cluster;
use crate::config::Etcd;

/// How long a member may take to answer.
const ANSWER: Duration = Duration::from_secs(2);

/// Keep this host's entry, and meet whom the others' entries name.
pub fn start(cluster: &Arc<Cluster>, etcd: Etcd) {
    let cluster = Arc::clone(cluster);
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        match runtime {
            Ok(runtime) => runtime.block_on(keep(&cluster, &etcd)),
            Err(e) => log::error!("etcd: {e}"),
        }
    });
}

/// A conversation with one member.
struct Talk<'a> {
    cluster: &'a Arc<Cluster>,
    etcd: &'a Etcd,
    /// It is the cluster's, whichever member granted it.
    lease: Option<i64>,
}

async fn keep(cluster: &Arc<Cluster>, etcd: &Etcd) {
    let every = (etcd.lease / 4).min(Duration::from_secs(1));
    let mut talk = Talk { cluster, etcd, lease: None };
    let mut answered = true;
    // One member at a time: the next one, when it does not answer.
    for member in etcd.endpoints.iter().cycle() {
        let error = match talk.connect(member).await {
            Err(e) => e,
            Ok(mut client) => loop {
                if let Err(e) = talk.once(&mut client).await {
                    break e;
                }
                if !answered {
                    answered = true;
                    log::info!("etcd: {member} answers");
                }
                tokio::time::sleep(every).await;
            },
        };
        if answered {
            log::warn!("etcd: {member}: {error}");
        }
        answered = false;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

impl Talk<'_> {
    async fn connect(&self, member: &str) -> Result<Client, String> {
        let mut options = ConnectOptions::new().with_timeout(ANSWER).with_connect_timeout(ANSWER);
        if let (Some(user), Some(password)) = (&self.etcd.user, &self.etcd.password) {
            options = options.with_user(user, password);
        }
        let read = |path: &std::path::Path| {
            std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))
        };
        let mut tls = TlsOptions::new();
        if let Some(ca) = &self.etcd.ca {
            tls = tls.ca_certificate(Certificate::from_pem(read(ca)?));
        }
        if let (Some(certificate), Some(key)) = (&self.etcd.certificate, &self.etcd.key) {
            tls = tls.identity(Identity::from_pem(read(certificate)?, read(key)?));
        }
        if member.starts_with("https://") {
            options = options.with_tls(tls);
        }
        Client::connect([member], Some(options)).await.map_err(|e| e.to_string())
    }

    /// Renew the lease and the entry; read the others'.
    async fn once(&mut self, client: &mut Client) -> Result<(), String> {
        let done = tokio::time::timeout(ANSWER * 2, self.exchange(client)).await;
        done.map_err(|_| "it does not answer".to_owned())?.map_err(|e| e.to_string())
    }

    async fn exchange(&mut self, client: &mut Client) -> Result<(), etcd_client::Error> {
        let prefix = format!("{}hosts/", self.etcd.prefix);
        let lease = match self.lease {
            Some(lease) => lease,
            None => {
                let granted = client.lease_grant(self.etcd.lease.as_secs() as i64, None::<LeaseGrantOptions>);
                *self.lease.insert(granted.await?.id())
            }
        };
        // It renews the lease once.
        match client.lease_keep_alive(lease).await {
            Ok(_) => {}
            // This host was silent for too long, or a person took the lease away: the next time with another one.
            Err(etcd_client::Error::LeaseKeepAliveError(_)) => {
                self.lease = None;
                return Ok(());
            }
            Err(e) => return Err(e),
        }
        let own = self.cluster.own_state();
        let value = serde_json::to_vec(&own).map_err(|e| etcd_client::Error::InvalidArgs(e.to_string()))?;
        let put = PutOptions::new().with_lease(lease);
        client
            .put(format!("{prefix}{}", own.name), value, Some(put))
            .await
            .inspect_err(|_| self.lease = None)?;
        let listed = client.get(prefix.clone(), Some(GetOptions::new().with_prefix())).await?;
        let mut names = Vec::new();
        for pair in listed.kvs() {
            let state: HostState = match serde_json::from_slice(pair.value()) {
                Ok(state) => state,
                Err(e) => {
                    log::warn!("etcd: {}: {e}", String::from_utf8_lossy(pair.key()));
                    continue;
                }
            };
            let is_named = pair.key() == format!("{prefix}{}", state.name).as_bytes();
            if is_named && state.name != own.name && !state.service.is_empty() {
                self.cluster.meet(&state.name, &state.service, false);
                names.push(state.name);
            }
        }
        self.cluster.forget_all_but(&names);
        Ok(())
    }
}
