//! A JSONL file or JSON array of samples or questions, with an image beside it.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vlmq::dataset::{open_questions, open_samples};

const IMAGE: &[u8] = include_bytes!("../../testdata/processor/images/bilevel.png");

fuzz_target!(
    init: { vlmq_fuzz::put("i.png", IMAGE); },
    |data: &[u8]| {
        let path = vlmq_fuzz::put("data.jsonl", data);
        vlmq_fuzz::check_places(open_samples(&path));
        let _ = open_questions(&path);
    }
);
