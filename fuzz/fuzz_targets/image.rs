//! An image of any format. Large ones are passed over: they only take time.

#![no_main]

use image::ImageReader;
use libfuzzer_sys::fuzz_target;
use std::io::Cursor;
use vlmq::processor::decode_image;

const MAX_PIXELS: u64 = 1 << 18;

fuzz_target!(
    init: { vlmq_fuzz::let_caught_panics_pass(); },
    |data: &[u8]| {
        if is_small(data).unwrap_or(true)
            && let Ok(image) = decode_image("image", data)
        {
            image.check().expect("sizes and data that agree");
        }
    }
);

fn is_small(data: &[u8]) -> Option<bool> {
    let reader = ImageReader::new(Cursor::new(data))
        .with_guessed_format()
        .ok()?;
    let (width, height) = reader.into_dimensions().ok()?;
    Some(u64::from(width) * u64::from(height) <= MAX_PIXELS)
}
