//! The `vlmq` command.

fn main() -> std::process::ExitCode {
    keep_candle_to_its_thread();
    tell_candle_of_threads();
    vlmq::cli::run().into()
}

/// Samples are worked on side by side, a thread each. candle's own threads for large element-wise
/// operations would be beside those, spin while they wait, and let one operation through at a time:
/// a third of a run with pictures of ordinary size. They can be turned off by this variable only.
fn keep_candle_to_its_thread() {
    set_unless_set("CANDLE_NUM_THREADS", "1");
}

/// candle asks for the number of cores at each product of matrices, and reads all of /proc/cpuinfo
/// for it: a sixth of a run with a small model. It reads this variable instead where it is set. What
/// rayon makes of it is what it would have done by itself.
fn tell_candle_of_threads() {
    if let Some(n) = vlmq::cli::default_threads() {
        set_unless_set("RAYON_NUM_THREADS", &n.to_string());
    }
}

/// A variable of the environment, to be called before anything runs.
fn set_unless_set(variable: &str, value: &str) {
    if std::env::var_os(variable).is_none() {
        // SAFETY: nothing has run yet, so no other thread reads or writes the environment.
        unsafe { std::env::set_var(variable, value) };
    }
}
