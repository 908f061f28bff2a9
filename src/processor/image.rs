//! Decoding of image files to the RGB bytes that `PIL.Image.open(f)`, `ImageOps.exif_transpose` and
//! `convert("RGB")` give: what transformers does with an image named by path, URL or base64.
//!
//! So transparency is dropped, never blended, and 16-bit grey is *clipped* at 255 while 16-bit
//! colour keeps its high byte. (transformers blends PIL objects with alpha that are handed to the
//! image processor directly onto white, and leaves them unrotated; that is another entry.)
//!
//! PNG, BMP, GIF and TIFF are lossless and come out equal to Pillow's. JPEG goes through another
//! inverse cosine transform and colour conversion than libjpeg-turbo; the measured difference is
//! recorded in `testdata/processor/images.json` and bounded by a test. Differs further: a JPEG
//! without its end marker counts as truncated; an orientation that only XMP holds is not read.

use crate::{Error, Result};
use image::metadata::Orientation;
use image::{DynamicImage, ExtendedColorType, ImageDecoder, ImageFormat, ImageReader};
use std::io::Cursor;
use std::path::Path;

/// More pixels than this are refused before any is decoded; the limit at which Pillow, too, stops.
pub const MAX_PIXELS: u64 = 178_956_970;
/// Ceiling of what a decoder may allocate: 16-bit RGBA at [`MAX_PIXELS`], and as much again.
const MAX_DECODER_BYTES: u64 = MAX_PIXELS * BYTES_PER_PIXEL;
/// The same for each pixel that an image has, and for what a small one needs besides.
const BYTES_PER_PIXEL: u64 = 16;
const MIN_DECODER_BYTES: u64 = 64 << 20;

/// An 8-bit RGB image, rows from the top, pixels interleaved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RgbImage {
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// `height · width · 3` bytes.
    pub data: Vec<u8>,
}

impl RgbImage {
    /// Whether the sizes and the data agree and the image is not empty.
    ///
    /// # Errors
    /// [`Error::Invalid`] if not.
    pub fn check(&self) -> Result<()> {
        let expected = self
            .width
            .checked_mul(self.height)
            .and_then(|n| n.checked_mul(3));
        if expected != Some(self.data.len()) || self.data.is_empty() {
            return Err(Error::Invalid {
                what: "image".into(),
                why: format!(
                    "{}x{} with {} bytes, expected {expected:?} and at least one pixel",
                    self.width,
                    self.height,
                    self.data.len()
                ),
            });
        }
        Ok(())
    }
}

/// The image in `bytes`, of whatever format its content shows; `name` is for messages only.
///
/// # Errors
/// [`Error::Format`] naming `name` if the bytes are no image, are damaged or end early, or the
/// image has more than [`MAX_PIXELS`]; [`Error::Unsupported`] for CMYK and floating-point images.
///
/// Source: Pillow 13 through transformers 5.23 `image_utils.load_image`.
pub fn decode_image(name: &str, bytes: &[u8]) -> Result<RgbImage> {
    let format = image::guess_format(bytes)
        .map_err(|_| bad(name, "not an image: its first bytes match no known format"))?;
    if format == ImageFormat::Jpeg && !jpeg_has_end(bytes) {
        return Err(bad(name, "truncated JPEG: no end-of-image marker"));
    }
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut limits = image::Limits::default();
    limits.max_alloc = Some(MAX_DECODER_BYTES);
    reader.limits(limits.clone());
    let mut decoder = reader.into_decoder().map_err(|e| undecodable(name, &e))?;
    let (width, height) = decoder.dimensions();
    let n_pixels = u64::from(width) * u64::from(height);
    if n_pixels > MAX_PIXELS {
        let why = format!("{width}x{height} pixels, at most {MAX_PIXELS} in all expected");
        return Err(bad(name, &why));
    }
    if decoder.original_color_type() == ExtendedColorType::Cmyk8 || is_four_channel_jpeg(bytes) {
        return Err(Error::Unsupported {
            what: format!("{name}: CMYK colours; convert the image to RGB"),
        });
    }
    // A frame of a GIF may be larger than the image that it is a part of.
    limits.max_alloc = Some((n_pixels * BYTES_PER_PIXEL).max(MIN_DECODER_BYTES));
    let limited = decoder.set_limits(limits);
    limited.map_err(|e| undecodable(name, &e))?;
    let grey16 = format == ImageFormat::Png && is_plain_grey16(bytes);
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let mut pixels = DynamicImage::from_decoder(decoder).map_err(|e| undecodable(name, &e))?;
    pixels.apply_orientation(orientation);
    let image = RgbImage {
        width: pixels.width() as usize,
        height: pixels.height() as usize,
        data: rgb_bytes(name, &pixels, grey16)?,
    };
    image.check()?;
    Ok(image)
}

fn bad(name: &str, why: &str) -> Error {
    Error::format(Path::new(name), "image data", why)
}

fn undecodable(name: &str, error: &image::ImageError) -> Error {
    bad(name, &format!("cannot be decoded: {error}"))
}

/// The lenient JPEG decoder fills what is missing with grey, so truncation is looked for here.
fn jpeg_has_end(bytes: &[u8]) -> bool {
    let start = jpeg_markers(bytes).find(|m| m.code == 0xDA);
    let body = start.map_or(bytes, |m| &bytes[m.payload..]);
    body.windows(2).any(|pair| pair == [0xFF, 0xD9])
}

fn is_four_channel_jpeg(bytes: &[u8]) -> bool {
    bytes.starts_with(&[0xFF, 0xD8])
        && jpeg_markers(bytes)
            .find(|m| matches!(m.code, 0xC0..=0xC3 | 0xC5..=0xC7 | 0xC9..=0xCB | 0xCD..=0xCF))
            .is_some_and(|m| bytes.get(m.payload + 5) == Some(&4))
}

struct JpegMarker {
    code: u8,
    /// Offset of the first byte after the length field.
    payload: usize,
}

/// The header markers of a JPEG up to and including the first start of scan.
fn jpeg_markers(bytes: &[u8]) -> impl Iterator<Item = JpegMarker> + '_ {
    let mut at = 2;
    let mut done = false;
    std::iter::from_fn(move || {
        while bytes.get(at) == Some(&0xFF) && bytes.get(at + 1) == Some(&0xFF) {
            at += 1;
        }
        let header = bytes.get(at..at + 4)?;
        if done || header[0] != 0xFF {
            return None;
        }
        let length = usize::from(u16::from_be_bytes([header[2], header[3]]));
        let payload = at + 4;
        at += 2 + length;
        done = header[1] == 0xDA;
        Some(JpegMarker {
            code: header[1],
            payload: payload.min(bytes.len()),
        })
    })
}

/// A PNG of 16-bit grey without an alpha channel of its own (a transparent value may be declared):
/// depth and colour type stand at fixed places of the first chunk.
fn is_plain_grey16(bytes: &[u8]) -> bool {
    bytes.get(24..26) == Some(&[16, 0])
}

fn rgb_bytes(name: &str, pixels: &DynamicImage, grey16: bool) -> Result<Vec<u8>> {
    let grey = |v: u8| [v; 3];
    let high = |v: u16| (v >> 8) as u8;
    let clipped = |v: u16| grey(v.min(255) as u8);
    Ok(match pixels {
        DynamicImage::ImageRgb8(p) => p.as_raw().clone(),
        DynamicImage::ImageRgba8(p) => p.pixels().flat_map(|x| [x.0[0], x.0[1], x.0[2]]).collect(),
        DynamicImage::ImageLuma8(p) => p.pixels().flat_map(|x| grey(x.0[0])).collect(),
        DynamicImage::ImageLumaA8(p) => p.pixels().flat_map(|x| grey(x.0[0])).collect(),
        DynamicImage::ImageLuma16(p) => p.pixels().flat_map(|x| clipped(x.0[0])).collect(),
        DynamicImage::ImageLumaA16(p) if grey16 => {
            p.pixels().flat_map(|x| clipped(x.0[0])).collect()
        }
        DynamicImage::ImageLumaA16(p) => p.pixels().flat_map(|x| grey(high(x.0[0]))).collect(),
        DynamicImage::ImageRgb16(p) => p.pixels().flat_map(|x| x.0.map(high)).collect(),
        DynamicImage::ImageRgba16(p) => p
            .pixels()
            .flat_map(|x| [high(x.0[0]), high(x.0[1]), high(x.0[2])])
            .collect(),
        other => {
            return Err(Error::Unsupported {
                what: format!(
                    "{name}: pixels of type {:?}; convert the image to 8-bit RGB",
                    other.color()
                ),
            });
        }
    })
}

/// The image of the generator that the goldens use: byte i is the top byte of the i-th state of
/// `s ← 1664525·s + 1013904223 (mod 2³²)`, starting from `width · 65536 + height`.
#[cfg(test)]
pub(crate) fn lcg_image(width: usize, height: usize) -> RgbImage {
    let mut state = (width as u32) << 16 | height as u32;
    let data = (0..width * height * 3)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        })
        .collect();
    RgbImage {
        width,
        height,
        data,
    }
}

/// CRC-32 as zlib computes it; goldens hold it in place of whole images.
#[cfg(test)]
pub(crate) fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg());
        }
    }
    !crc
}
