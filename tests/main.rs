//! The real program on the bundled model, and on damaged copies of it.

mod cli;
