//! Lists the linears that would be quantized in a checkpoint.
//!
//! Run: cargo run --example inspect_checkpoint -- testbed/model

use std::path::PathBuf;
use vlmq::checkpoint::Checkpoint;
use vlmq::families::open_model;

fn main() -> vlmq::Result<()> {
    let folder = std::env::args()
        .nth(1)
        .map_or("testbed/model".into(), PathBuf::from);
    let model = open_model(Checkpoint::open(&folder)?, candle_core::Device::Cpu)?;
    for module in model.modules() {
        println!(
            "{:<40} {:>6} x {}",
            module.name, module.shape[0], module.shape[1]
        );
    }
    Ok(())
}
