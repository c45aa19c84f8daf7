//! Sound: Intel's High Definition Audio with codecs whose back end plays to nobody and hears silence.

pub mod codec;
pub mod hda;
