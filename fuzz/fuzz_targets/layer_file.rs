//! The file of a finished layer, with a digest that is right.
//!
//! The first byte: 0 takes the rest as the file, 1 puts magic and version before it, all others
//! make a file of a footer, the text up to the first line break, and data.

#![no_main]

use libfuzzer_sys::fuzz_target;
use std::cell::LazyCell;
use std::path::PathBuf;
use vlmq::journal::{Journal, Resume};

const START: &[u8] = b"vlmqlayr\x01\0\0\0";

thread_local! {
    static JOURNAL: LazyCell<(Journal, PathBuf)> = LazyCell::new(|| {
        let output = vlmq_fuzz::folder().join("out");
        let journal = Journal::open(&output, Resume::Never).expect("a journal");
        let path = journal.layer_path(0);
        (journal, path)
    });
}

fuzz_target!(|data: &[u8]| {
    let Some((kind, rest)) = data.split_first() else {
        return;
    };
    let mut file = match kind {
        0 => rest.to_vec(),
        1 => [START, rest].concat(),
        _ => with_footer(rest),
    };
    file.extend(blake3::hash(&file).as_bytes());
    JOURNAL.with(|held| {
        std::fs::write(&held.1, &file).expect("the file is written");
        if let Ok(Some(layer)) = held.0.finished(0, || Ok(String::new())) {
            for (_, weight) in layer.weights {
                assert_eq!(weight.dequantize().rows(), weight.rows());
            }
        }
    });
});

fn with_footer(rest: &[u8]) -> Vec<u8> {
    let at = rest.iter().position(|b| *b == b'\n').unwrap_or(rest.len());
    let (footer, data) = rest.split_at(at);
    let data = data.get(1..).unwrap_or_default();
    let n_footer = (footer.len() as u64).to_le_bytes();
    [START, data, footer, &n_footer].concat()
}
