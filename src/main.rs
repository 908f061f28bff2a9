//! The `vlmq` command.

mod cli;

fn main() -> std::process::ExitCode {
    keep_candle_to_its_thread();
    cli::run()
}

/// Samples are worked on side by side, a thread each. candle's own threads for large element-wise
/// operations would be beside those, spin while they wait, and let one operation through at a time:
/// a third of a run with pictures of ordinary size. They can be turned off by this variable only.
fn keep_candle_to_its_thread() {
    const VARIABLE: &str = "CANDLE_NUM_THREADS";
    if std::env::var_os(VARIABLE).is_none() {
        // SAFETY: nothing has run yet, so no other thread reads or writes the environment.
        unsafe { std::env::set_var(VARIABLE, "1") };
    }
}
