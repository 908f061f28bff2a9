//! `model.safetensors` in a folder whose weights are said to be quantized, and every reader of it.
//!
//! An odd first byte: a header alone, to which its length and as many zeros as it asks for are
//! added. Else the file as it is.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vlmq::checkpoint::{CONFIG_FILE, Checkpoint, WEIGHTS_FILE};

const CONFIG: &str = include_str!("../seeds/config/quantized.json");
const MAX_ZEROS: usize = 4096;

fuzz_target!(
    init: { vlmq_fuzz::put(CONFIG_FILE, CONFIG.as_bytes()); },
    |data: &[u8]| {
        let Some((kind, rest)) = data.split_first() else {
            return;
        };
        let file = match kind % 2 {
            1 => with_length_and_data(rest),
            _ => rest.to_vec(),
        };
        vlmq_fuzz::put(WEIGHTS_FILE, &file);
        if let Ok(checkpoint) = Checkpoint::open(vlmq_fuzz::folder()) {
            vlmq_fuzz::read_all(&checkpoint);
        }
    }
);

/// The header with its length before it and the data that its largest offset speaks of.
fn with_length_and_data(header: &[u8]) -> Vec<u8> {
    let numbers = header.split(|b| !b.is_ascii_digit());
    let numbers = numbers.filter_map(|n| std::str::from_utf8(n).ok()?.parse::<usize>().ok());
    let n_data = numbers.filter(|n| *n <= MAX_ZEROS).max().unwrap_or(0);
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.resize(file.len() + n_data, 0);
    file
}
