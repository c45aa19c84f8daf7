//! ftvm-net
