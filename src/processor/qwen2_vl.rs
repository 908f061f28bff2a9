//! The image side of Qwen2-VL: the size an image is brought to, its normalisation, its patches.
//!
//! Every operation runs in the order and the precision of transformers' Pillow backend, so the
//! patches are bit-identical to its `pixel_values`. A byte takes 256 values per channel, so
//! rescaling and normalising are one table look-up.
//!
//! Source: transformers 5.23 `Qwen2VLImageProcessorPil`. Its torchvision backend, which
//! `AutoProcessor` prefers where torchvision is installed, resamples and rounds differently.

use crate::processor::image::RgbImage;
use crate::processor::resize::{Filter, resize};
use crate::processor::settings::{
    CHANNELS, CLIP_MEAN, CLIP_STD, ImageSettings, Settings, Size, ValueTable,
};
use crate::processor::{ImageProcessor, VisionInput};
use crate::{Error, Matrix, Result};
use serde_json::Value;
use std::path::Path;

/// Longest to shortest side above which an image is refused.
const MAX_ASPECT: f64 = 200.0;
/// Bounds of what a configuration may ask for, far above every published model.
const MAX_PATCH: usize = 256;
const MAX_PIXELS: usize = 1 << 28;
/// Values of one image's patches, 8 GiB of them: each setting within its bounds, all together.
const MAX_VALUES: usize = 1 << 31;

/// The size nearest to `size` whose sides are multiples of `factor` and whose area lies between
/// `min_pixels` and `max_pixels`, keeping the aspect ratio as well as that allows.
///
/// # Errors
/// [`Error::Invalid`] if a side is zero, the longer side exceeds 200 times the shorter, or
/// `factor` or `max_pixels` is zero.
///
/// Source: `smart_resize` of transformers 5.23; halves round to even as in Python.
pub fn smart_resize(
    size: Size,
    factor: usize,
    min_pixels: usize,
    max_pixels: usize,
) -> Result<Size> {
    let (height, width) = (size.height as f64, size.width as f64);
    let invalid = |why: String| Error::Invalid {
        what: format!("image of {}x{} pixels", size.width, size.height),
        why,
    };
    if size.height == 0 || size.width == 0 || factor == 0 || max_pixels == 0 {
        return Err(invalid(format!(
            "sides, patch factor {factor} and max_pixels {max_pixels} must be positive"
        )));
    }
    let aspect = height.max(width) / height.min(width);
    if aspect > MAX_ASPECT {
        return Err(invalid(format!(
            "aspect ratio {aspect:.1}, at most {MAX_ASPECT} expected"
        )));
    }
    let unit = factor as f64;
    let rounded = |side: f64| (side / unit).round_ties_even() * unit;
    let (mut to_height, mut to_width) = (rounded(height), rounded(width));
    let area = to_height * to_width;
    if area > max_pixels as f64 {
        let shrink = (height * width / max_pixels as f64).sqrt();
        let fit = |side: f64| ((side / shrink / unit).floor() * unit).max(unit);
        (to_height, to_width) = (fit(height), fit(width));
    } else if area < min_pixels as f64 {
        let grow = (min_pixels as f64 / (height * width)).sqrt();
        let fit = |side: f64| (side * grow / unit).ceil() * unit;
        (to_height, to_width) = (fit(height), fit(width));
    }
    Ok(Size {
        height: to_height as usize,
        width: to_width as usize,
    })
}

/// The image settings of one checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct Preprocessor {
    min_pixels: usize,
    max_pixels: usize,
    patch_size: usize,
    temporal_patch_size: usize,
    merge_size: usize,
    filter: Filter,
    resizes: bool,
    values: ValueTable,
    image_token: String,
}

/// What the published templates write for an image.
const DEFAULT_IMAGE_TOKEN: &str = "<|image_pad|>";

impl ImageProcessor for Preprocessor {
    fn vision_input(&self, image: &RgbImage, _: usize) -> Result<VisionInput> {
        self.patches_of(image)
    }

    fn placeholder(&self) -> &str {
        &self.image_token
    }

    fn image_token(&self) -> &str {
        &self.image_token
    }
}

impl Preprocessor {
    /// The settings of a checkpoint of Qwen2-VL, Qwen2.5-VL or Qwen3-VL.
    ///
    /// # Errors
    /// As [`Preprocessor::from_json`]; [`Error::Unsupported`] for another image processor.
    pub fn open(settings: &ImageSettings) -> Result<Self> {
        settings.require_kind(&[
            "Qwen2VLImageProcessor",
            "Qwen2VLImageProcessorFast",
            "Qwen2VLImageProcessorPil",
        ])?;
        let mut found = Self::from_json(&settings.path, &settings.images)?;
        if let Some(token) = settings.token("image_token") {
            found.image_token = token;
        }
        Ok(found)
    }

    /// The settings in `value`, the content of `path` (`preprocessor_config.json`). Absent keys
    /// take the family's defaults; `min_pixels`/`max_pixels` beside `size` override it, and are
    /// read inside `size` too.
    ///
    /// # Errors
    /// [`Error::Format`] naming the key whose value is of another type or out of range;
    /// [`Error::Unsupported`] for an unknown `resample`.
    pub fn from_json(path: &Path, value: &Value) -> Result<Self> {
        if !value.is_object() {
            return Err(Error::format(path, "top level", "a JSON object expected"));
        }
        let top = Settings { path, value };
        let size = Settings {
            path,
            value: &value["size"],
        };
        let pixels = |short: &str, edge: &str, default: usize| -> Result<usize> {
            let inner = size.integer(short, default, MAX_PIXELS)?;
            let inner = size.integer(edge, inner, MAX_PIXELS)?;
            top.integer(short, inner, MAX_PIXELS)
        };
        Ok(Self {
            min_pixels: pixels("min_pixels", "shortest_edge", 56 * 56)?,
            max_pixels: pixels("max_pixels", "longest_edge", 28 * 28 * 1280)?,
            patch_size: top.integer("patch_size", 14, MAX_PATCH)?,
            temporal_patch_size: top.integer("temporal_patch_size", 2, MAX_PATCH)?,
            merge_size: top.integer("merge_size", 2, MAX_PATCH)?,
            filter: Filter::from_pillow(top.integer("resample", 3, 255)? as u64)?,
            resizes: top.flag("do_resize")?,
            values: ValueTable::read(&top, CLIP_MEAN, CLIP_STD)?,
            image_token: DEFAULT_IMAGE_TOKEN.to_owned(),
        })
    }

    /// The patches of `image`, bit-identical to transformers' `pixel_values` in f32.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the image is empty, its aspect ratio exceeds 200, its patches would
    /// have more than 2³¹ values, or `do_resize` is off and its sides are no multiples of
    /// `patch_size · merge_size`.
    pub fn patches_of(&self, image: &RgbImage) -> Result<VisionInput> {
        image.check()?;
        let factor = self.patch_size * self.merge_size;
        let size = Size {
            height: image.height,
            width: image.width,
        };
        let to = match self.resizes {
            true => smart_resize(size, factor, self.min_pixels, self.max_pixels)?,
            false => size,
        };
        self.check_values(to)?;
        let image = if self.resizes {
            &resize(image, to.width, to.height, self.filter)?
        } else {
            image
        };
        if !image.width.is_multiple_of(factor) || !image.height.is_multiple_of(factor) {
            return Err(Error::Invalid {
                what: format!("image of {}x{} pixels", image.width, image.height),
                why: format!("do_resize is off, so multiples of {factor} are expected"),
            });
        }
        self.patchify(image)
    }

    fn check_values(&self, size: Size) -> Result<()> {
        let sides = [size.height, size.width, CHANNELS, self.temporal_patch_size];
        let n_values = sides.iter().try_fold(1usize, |n, s| n.checked_mul(*s));
        if n_values.is_some_and(|n| n <= MAX_VALUES) {
            return Ok(());
        }
        Err(Error::Invalid {
            what: format!("image of {}x{} pixels, resized", size.width, size.height),
            why: format!(
                "{CHANNELS} channels times {} frames of it are more than {MAX_VALUES} values",
                self.temporal_patch_size
            ),
        })
    }

    fn patchify(&self, image: &RgbImage) -> Result<VisionInput> {
        let (patch, merge, frames) = (self.patch_size, self.merge_size, self.temporal_patch_size);
        let (grid_h, grid_w) = (image.height / patch, image.width / patch);
        let table = self.values.channels();
        let mut data = Vec::with_capacity(image.data.len() * frames);
        for index in 0..grid_h * grid_w {
            let within = index % (merge * merge);
            let group = index / (merge * merge);
            let groups_per_row = grid_w / merge;
            let y = (group / groups_per_row * merge + within / merge) * patch;
            let x = (group % groups_per_row * merge + within % merge) * patch;
            for (channel, values) in table.iter().enumerate() {
                for _ in 0..frames {
                    for row in y..y + patch {
                        let start = (row * image.width + x) * CHANNELS;
                        let pixels = image.data[start..start + patch * CHANNELS].chunks_exact(3);
                        data.extend(pixels.map(|p| values[usize::from(p[channel])]));
                    }
                }
            }
        }
        let cols = CHANNELS * frames * patch * patch;
        Ok(VisionInput {
            patches: Matrix::from_vec("image patches", grid_h * grid_w, cols, data)?,
            grid_thw: [1, grid_h, grid_w],
            n_tokens: grid_h * grid_w / (merge * merge),
            tiling: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::processor::image::{crc32, lcg_image};
    use proptest::prelude::*;

    fn preprocessor(value: &Value) -> Preprocessor {
        Preprocessor::from_json(Path::new("preprocessor_config.json"), value).unwrap()
    }

    #[derive(serde::Deserialize)]
    struct Case {
        settings: usize,
        size: [usize; 2],
        grid_thw: [usize; 3],
        crc32: u32,
        head: Vec<f32>,
    }

    #[test]
    fn pixel_values_are_bit_identical_to_transformers() {
        let golden = include_str!("../../testdata/processor/pixel_values.json");
        let golden: Value = serde_json::from_str(golden).unwrap();
        let cases: Vec<Case> = serde_json::from_value(golden["cases"].clone()).unwrap();
        assert!(cases.len() >= 30);
        for case in cases {
            let processor = preprocessor(&golden["settings"][case.settings]);
            let image = lcg_image(case.size[0], case.size[1]);
            let out = processor.patches_of(&image).unwrap();
            assert_eq!(out.grid_thw, case.grid_thw, "{:?}", case.size);
            assert_eq!(&out.patches.data()[..case.head.len()], case.head);
            let bytes: Vec<u8> = out
                .patches
                .data()
                .iter()
                .flat_map(|v| v.to_le_bytes())
                .collect();
            assert_eq!(
                crc32(&bytes),
                case.crc32,
                "{:?} settings {}",
                case.size,
                case.settings
            );
        }
    }

    #[test]
    fn smart_resize_equals_transformers() {
        let golden = include_str!("../../testdata/processor/pixel_values.json");
        let golden: Value = serde_json::from_str(golden).unwrap();
        let cases: Vec<[usize; 7]> =
            serde_json::from_value(golden["smart_resize"].clone()).unwrap();
        assert!(cases.len() >= 100);
        for [height, width, factor, min, max, to_height, to_width] in cases {
            let out = smart_resize(Size { height, width }, factor, min, max).unwrap();
            assert_eq!((out.height, out.width), (to_height, to_width));
        }
    }

    #[test]
    fn extreme_and_empty_shapes_are_refused() {
        let size = |height, width| Size { height, width };
        assert!(smart_resize(size(1, 201), 28, 3136, 1_003_520).is_err());
        assert!(smart_resize(size(1, 200), 28, 3136, 1_003_520).is_ok());
        assert!(smart_resize(size(0, 5), 28, 3136, 1_003_520).is_err());
        let empty = RgbImage {
            width: 0,
            height: 0,
            data: Vec::new(),
        };
        let processor = preprocessor(&serde_json::json!({}));
        assert!(processor.patches_of(&empty).is_err());
    }

    #[test]
    fn both_spellings_of_the_size_are_read() {
        let top = preprocessor(&serde_json::json!({"min_pixels": 784, "max_pixels": 7840,
            "size": {"shortest_edge": 1, "longest_edge": 2}}));
        let edges = preprocessor(&serde_json::json!({
            "size": {"shortest_edge": 784, "longest_edge": 7840}}));
        let inner = preprocessor(&serde_json::json!({
            "size": {"min_pixels": 784, "max_pixels": 7840}}));
        assert_eq!(top, edges);
        assert_eq!(top, inner);
    }

    #[test]
    fn settings_of_a_wrong_type_name_the_key() {
        for (key, value) in [
            ("patch_size", serde_json::json!("14")),
            ("merge_size", serde_json::json!(0)),
            ("image_std", serde_json::json!([1.0, 0.0, 1.0])),
            ("image_mean", serde_json::json!([1.0, 0.0])),
            ("do_resize", serde_json::json!(1)),
        ] {
            let error =
                Preprocessor::from_json(Path::new("p.json"), &serde_json::json!({key: value}));
            let message = error.unwrap_err().to_string();
            assert!(
                message.contains(key) && message.contains("p.json"),
                "{message}"
            );
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]
        #[test]
        fn sizes_are_multiples_within_bounds(h in 1usize..3000, w in 1usize..3000) {
            prop_assume!(h.max(w) <= 200 * h.min(w));
            let out = smart_resize(Size { height: h, width: w }, 28, 3136, 1_003_520).unwrap();
            prop_assert!(out.height.is_multiple_of(28) && out.width.is_multiple_of(28));
            prop_assert!(out.height >= 28 && out.width >= 28);
            prop_assert!(out.height * out.width >= 3136);
        }
    }
}
