//! The `vlmq` command.
fn main() {}
