//! ftvm-qmp
