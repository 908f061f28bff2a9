//! Writes a folder of GGUF files: `cargo run --example export_gguf -- MODEL OUTPUT`.

use std::path::Path;
use vlmq::checkpoint::Checkpoint;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, model, output] = arguments.as_slice() else {
        return Err("a model folder and an output folder expected".into());
    };
    let checkpoint = Checkpoint::open(Path::new(model))?;
    let exported = vlmq::export::gguf::export(&checkpoint, Path::new(output))?;
    println!("{}", serde_json::to_string_pretty(&exported)?);
    Ok(())
}
