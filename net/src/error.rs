//! Errors of network back ends.

/// Errors of opening a back end.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    #[error("could not configure /dev/net/tun ({0}): {1}")]
    Tap(String, #[source] std::io::Error),
    #[error("could not start a thread for the network: {0}")]
    Thread(#[source] std::io::Error),
    #[error("user networking: {0}")]
    User(String),
    #[error("network script {0} failed with status {1}")]
    Script(String, i32),
}
