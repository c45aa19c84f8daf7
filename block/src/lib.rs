//! ftvm-block
