//! `ftvmd`, the D-Bus service of the machines of one host, and `ftctl`, its command line.
//!
//! The service starts ftvm processes, watches them over QMP and shows them on the bus. With its peers on other hosts it
//! gives a machine that lost its backup a new one. It keeps nothing that is not in the definitions, in the run
//! directory or in the processes themselves, so it may be restarted at any time.

pub mod access;
pub mod bus;
pub mod check;
pub mod cluster;
pub mod config;
pub mod ctl;
pub mod definition;
pub mod foreign;
mod launch;
pub mod machine;
mod machined;
pub mod page;
pub mod qmp;
pub mod registry;
pub mod service;

/// The name on the bus.
pub const BUS_NAME: &str = "org.ftvm";
/// The root object.
pub const ROOT: &str = "/org/ftvm";

/// What can go wrong, as one sentence for a person.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0}: {1}")]
    File(String, std::io::Error),
    #[error("there is no machine '{0}'")]
    Unknown(String),
    /// What a definition says cannot be.
    #[error("{0}")]
    Invalid(String),
    /// The machine is not in a state for this.
    #[error("{0}")]
    State(String),
    /// ftvm could not be started, or refused a command.
    #[error("{0}")]
    Machine(String),
}

/// A result with a sentence.
pub type Result<T> = std::result::Result<T, Error>;

impl From<Error> for zbus::fdo::Error {
    fn from(error: Error) -> Self {
        let text = error.to_string();
        match error {
            Error::File(..) => zbus::fdo::Error::IOError(text),
            Error::Unknown(_) => zbus::fdo::Error::UnknownObject(text),
            Error::Invalid(_) => zbus::fdo::Error::InvalidArgs(text),
            Error::State(_) | Error::Machine(_) => zbus::fdo::Error::Failed(text),
        }
    }
}
