//! Tests of the software processor.
