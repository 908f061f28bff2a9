//! The settings files of a processor, one at a time, beside genuine ones. The first byte says
//! which.

#![no_main]

use libfuzzer_sys::fuzz_target;
use serde_json::Value;
use std::sync::Arc;
use vlmq::families::open_processor;
use vlmq::processor::{ContentPart, Message, Processor, RgbImage, Role};

/// A small one, for the pattern of the genuine one takes long to compile.
const TOKENIZER: &[u8] = include_bytes!("../seeds/tokenizer.json");

macro_rules! genuine {
    ($name:literal) => {
        (
            $name,
            include_bytes!(concat!("../../testdata/processor/model/", $name)),
        )
    };
}

const FILES: [(&str, &[u8]); 7] = [
    genuine!("config.json"),
    genuine!("tokenizer_config.json"),
    genuine!("preprocessor_config.json"),
    genuine!("generation_config.json"),
    ("tokenizer.json", TOKENIZER),
    ("processor_config.json", b"{}"),
    (
        "chat_template.json",
        br#"{"chat_template":"{% for m in messages %}{{ m.content }}{% endfor %}"}"#,
    ),
];

fuzz_target!(
    init: {
        vlmq_fuzz::let_caught_panics_pass();
        for (name, content) in FILES {
            vlmq_fuzz::put(name, content);
        }
    },
    |data: &[u8]| {
        let Some((kind, rest)) = data.split_first() else {
            return;
        };
        let (name, content) = FILES[usize::from(*kind) % FILES.len()];
        vlmq_fuzz::put(name, rest);
        if let Ok(processor) = open_processor(vlmq_fuzz::folder()) {
            let settings = serde_json::from_slice(rest).unwrap_or(Value::Null);
            use_it(&processor, asks_for_much(&settings));
        }
        vlmq_fuzz::put(name, content);
    }
);

fn use_it(processor: &Processor, without_images: bool) {
    let _ = processor.encode_text("one two\u{e9}");
    let _ = processor.decode(&[0, 1, 2, u32::MAX]);
    let mut message = Message::text(Role::User, "two");
    let _ = processor.encode_prompt(std::slice::from_ref(&message), &[]);
    if without_images {
        return;
    }
    let image = RgbImage {
        width: 5,
        height: 3,
        data: vec![7; 45],
    };
    if let Ok(image) = processor.vision_input(&image, 1) {
        message.content.push(ContentPart::Image);
        let _ = processor.encode_conversation(&[message], &[Arc::new(image)]);
    }
}

/// Whether settings are allowed, but only take time and memory.
fn asks_for_much(settings: &Value) -> bool {
    match settings {
        Value::Array(list) => list.iter().any(asks_for_much),
        Value::Object(map) => map.iter().any(|(key, value)| {
            let limit = match key.as_str() {
                "patch_size" | "merge_size" | "temporal_patch_size" => 16,
                "min_pixels" | "shortest_edge" => 1 << 14,
                _ => u64::MAX,
            };
            value.as_u64().is_some_and(|n| n > limit) || asks_for_much(value)
        }),
        _ => false,
    }
}
