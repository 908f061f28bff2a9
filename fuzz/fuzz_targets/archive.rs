//! An `images.zip`: its directory, and the members that rows name.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vlmq::dataset::open_samples;

const ROWS: &str = r#"{"question":"q","image":"a"}
{"question":"q","images":["a","b/c.png"]}"#;

fuzz_target!(|data: &[u8]| {
    vlmq_fuzz::put("images.zip", data);
    for row in ROWS.lines() {
        let path = vlmq_fuzz::put("data.jsonl", row.as_bytes());
        for sample in open_samples(&path).iter().flat_map(|set| set.samples()) {
            for image in sample.images() {
                let _ = image.read();
            }
        }
    }
});
