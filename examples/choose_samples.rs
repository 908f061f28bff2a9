//! Prints which samples a run chooses, one `file:line` each: for other tools, so that they see the same.
//!
//! Run: cargo run --example choose_samples -- testbed/calibration 128 0

use std::path::Path;
use vlmq::dataset::open_samples;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [data, n_samples, seed] = arguments.as_slice() else {
        return Err("usage: choose_samples DATA SAMPLES SEED".into());
    };
    let set = open_samples(Path::new(data))?;
    for sample in set.choose(n_samples.parse()?, seed.parse()?)? {
        println!("{}", sample.origin);
    }
    Ok(())
}
