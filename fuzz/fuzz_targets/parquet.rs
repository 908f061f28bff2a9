//! A parquet file of samples or questions.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vlmq::dataset::{open_questions, open_samples};

fuzz_target!(
    init: { vlmq_fuzz::let_caught_panics_pass(); },
    |data: &[u8]| {
        let path = vlmq_fuzz::put("data.parquet", data);
        vlmq_fuzz::check_places(open_samples(&path));
        let _ = open_questions(&path);
    }
);
