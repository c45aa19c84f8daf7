//! ftvm: the program.
