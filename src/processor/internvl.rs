//! The image side of InternVL: an image is brought to the grid of square tiles whose shape is nearest
//! to its own, and a small view of the whole follows the tiles.
//!
//! Transformers' form of the checkpoints has its settings in the image processor's file, OpenGVLab's
//! own form in `config.json`. The two cut alike.
//!
//! Source: transformers 5.23 `GotOcr2ImageProcessorPil`, `InternVLProcessor`; `dynamic_preprocess` in
//! OpenGVLab's model cards.

use crate::processor::image::RgbImage;
use crate::processor::resize::{Filter, resize};
use crate::processor::settings::{
    CHANNELS, CLIP_MEAN, CLIP_STD, ImageSettings, Settings, Size, ValueTable,
};
use crate::processor::{ImageProcessor, Tiling, VisionInput, tiles};
use crate::{Error, Result};
use serde_json::Value;

/// Bounds of what a configuration may ask for, far above every published model.
const MAX_SIDE: usize = 1 << 14;
const MAX_PATCH: usize = 256;
const MAX_TILES: usize = 256;
const MAX_TOKENS: usize = 1 << 16;
/// Bytes of an image brought to its grid.
const MAX_BYTES: usize = 1 << 31;

/// The mean of ImageNet, which OpenGVLab's code normalises with.
pub(crate) const IMAGENET_MEAN: [f64; CHANNELS] = [0.485, 0.456, 0.406];
/// The deviation of ImageNet.
pub(crate) const IMAGENET_STD: [f64; CHANNELS] = [0.229, 0.224, 0.225];

/// The token that stands for a row of the tower's output, unless the tokenizer names another.
pub const CONTEXT_TOKEN: &str = "<IMG_CONTEXT>";
const START_TOKEN: &str = "<img>";
const END_TOKEN: &str = "</img>";

/// The image settings of one checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct InternVlImages {
    /// Side of a tile in pixels.
    side: usize,
    patch: usize,
    tokens_per_tile: usize,
    min_tiles: usize,
    /// Not cut if one.
    max_tiles: usize,
    /// Whether a view of the whole follows where there are several tiles.
    adds_whole: bool,
    filter: Filter,
    values: ValueTable,
    tokens: Tokens,
}

/// Texts around and in place of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Tokens {
    placeholder: String,
    start: String,
    context: String,
    end: String,
}

/// A side in pixels: a number, or two equal ones.
pub fn side_of(value: &Value) -> Option<usize> {
    let side = match value.as_array().map(Vec::as_slice) {
        Some([height, width]) if height == width => height,
        Some(_) => return None,
        None => value,
    };
    let side = usize::try_from(side.as_u64()?).ok()?;
    (1..=MAX_SIDE).contains(&side).then_some(side)
}

impl InternVlImages {
    /// The settings of a checkpoint in transformers' form. `crop_to_patches` is not read: the
    /// processor of the family switches it on whatever the file says.
    ///
    /// # Errors
    /// [`Error::Format`] naming the key whose value cannot be; [`Error::Unsupported`] for another
    /// image processor, an unknown `resample`, or images that are neither cut nor resized.
    pub fn transformers(settings: &ImageSettings) -> Result<Self> {
        settings.require_kind(&[
            "GotOcr2ImageProcessor",
            "GotOcr2ImageProcessorFast",
            "GotOcr2ImageProcessorPil",
        ])?;
        let top = settings.of_images();
        let processor = Settings {
            path: &settings.path.with_file_name("processor_config.json"),
            value: &settings.processor,
        };
        let context = token(settings, "context_image_token", CONTEXT_TOKEN);
        let images = Self {
            side: square(&top, "size", 384)?,
            patch: patch(settings)?,
            tokens_per_tile: processor.integer("image_seq_length", 256, MAX_TOKENS)?,
            min_tiles: top.integer("min_patches", 1, MAX_TILES)?,
            max_tiles: top.integer("max_patches", 12, MAX_TILES)?,
            adds_whole: true,
            filter: Filter::from_pillow(top.integer("resample", 3, 255)? as u64)?,
            values: ValueTable::read(&top, CLIP_MEAN, CLIP_STD)?,
            tokens: Tokens {
                placeholder: context.clone(),
                start: token(settings, "start_image_token", START_TOKEN),
                context,
                end: token(settings, "end_image_token", END_TOKEN),
            },
        };
        if images.max_tiles == 1 && !top.flag("do_resize")? {
            return Err(Error::Unsupported {
                what: format!("{}: do_resize false", settings.path.display()),
            });
        }
        images.bounded(&top, "max_patches")
    }

    /// The settings of a checkpoint in OpenGVLab's form. Only mean and deviation are taken from the
    /// image processor's file, which need not be there.
    ///
    /// # Errors
    /// [`Error::Format`] naming the key whose value cannot be.
    pub fn opengvlab(settings: &ImageSettings) -> Result<Self> {
        let path = settings.path.with_file_name("config.json");
        let model = Settings {
            path: &path,
            value: &settings.model,
        };
        let flag = |key: &str| match model.value[key].is_null() {
            true => Ok(false),
            false => model.flag(key),
        };
        let size = match model.value["force_image_size"].is_null() {
            true => &model.value["vision_config"]["image_size"],
            false => &model.value["force_image_size"],
        };
        let side =
            side_of(size).ok_or_else(|| model.bad("force_image_size", "a side in pixels"))?;
        let patch = patch(settings)?;
        let ratio = model.number("downsample_ratio", 0.5)?;
        let max_tiles = match flag("dynamic_image_size")? {
            true => model.integer("max_dynamic_patch", 6, MAX_TILES)?,
            false => 1,
        };
        let images = Self {
            side,
            patch,
            tokens_per_tile: (((side / patch) as f64 * ratio).powi(2)) as usize,
            min_tiles: model.integer("min_dynamic_patch", 1, MAX_TILES)?,
            max_tiles,
            adds_whole: flag("use_thumbnail")?,
            filter: Filter::Bicubic,
            values: ValueTable::read(&settings.of_images(), IMAGENET_MEAN, IMAGENET_STD)?,
            tokens: Tokens {
                placeholder: "<image>".to_owned(),
                start: START_TOKEN.to_owned(),
                context: CONTEXT_TOKEN.to_owned(),
                end: END_TOKEN.to_owned(),
            },
        };
        images.bounded(&model, "max_dynamic_patch")
    }

    /// Makes sure that an image in as many tiles as may be has a size that can be.
    fn bounded(self, settings: &Settings, key: &str) -> Result<Self> {
        let sides = [self.max_tiles, self.side, self.side, CHANNELS];
        let n_bytes = sides
            .iter()
            .try_fold(1usize, |n, side| n.checked_mul(*side));
        match n_bytes.is_some_and(|n| n <= MAX_BYTES) {
            true => Ok(self),
            false => {
                let expected = format!("tiles of {} pixels a side with fewer bytes", self.side);
                Err(settings.bad(key, &expected))
            }
        }
    }

    fn resized(&self, image: &RgbImage, grid: Grid) -> Result<RgbImage> {
        let (width, height) = (grid.cols * self.side, grid.rows * self.side);
        resize(image, width, height, self.filter)
    }
}

impl ImageProcessor for InternVlImages {
    fn vision_input(&self, image: &RgbImage, _: usize) -> Result<VisionInput> {
        image.check()?;
        let size = Size {
            height: image.height,
            width: image.width,
        };
        let grid = match self.max_tiles {
            1 => Grid::WHOLE,
            _ => Grid::nearest(size, self.side, self.min_tiles, self.max_tiles),
        };
        let mut views = tiles::cut(&self.resized(image, grid)?, self.side);
        if self.adds_whole && views.len() > 1 {
            views.push(self.resized(image, Grid::WHOLE)?);
        }
        let (rows, cols) = tiles::grid_of(&views, self.patch);
        Ok(VisionInput {
            patches: tiles::patches(&views, self.patch, &self.values)?,
            grid_thw: [views.len(), rows, cols],
            n_tokens: views.len() * self.tokens_per_tile,
            tiling: (views.len() > 1).then_some(Tiling {
                rows: grid.rows,
                cols: grid.cols,
                height: size.height,
                width: size.width,
            }),
        })
    }

    fn placeholder(&self) -> &str {
        &self.tokens.placeholder
    }

    fn image_token(&self) -> &str {
        &self.tokens.context
    }

    fn prompt_text(&self, image: &VisionInput) -> String {
        let Tokens {
            start,
            context,
            end,
            ..
        } = &self.tokens;
        format!("{start}{}{end}", context.repeat(image.n_tokens))
    }
}

/// Tiles beside and below each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Grid {
    rows: usize,
    cols: usize,
}

impl Grid {
    const WHOLE: Self = Self { rows: 1, cols: 1 };

    /// The grid of `min..=max` tiles of `side`² pixels whose shape is nearest to that of `size`. Of
    /// grids equally near the last one, fewer tiles coming first, that the image fills more than
    /// half of; else the first.
    fn nearest(size: Size, side: usize, min: usize, max: usize) -> Self {
        let shape = size.width as f64 / size.height as f64;
        let area = (size.width * size.height) as f64;
        let pairs =
            (1..=max).flat_map(|cols| (1..=max / cols).map(move |rows| Self { rows, cols }));
        let mut grids: Vec<Self> = pairs.filter(|g| g.rows * g.cols >= min).collect();
        // Stable: of as many tiles, the narrower grid first.
        grids.sort_by_key(|grid| grid.rows * grid.cols);
        let (mut best, mut least) = (Self::WHOLE, f64::INFINITY);
        for grid in grids {
            let distance = (shape - grid.cols as f64 / grid.rows as f64).abs();
            let half = 0.5 * (side * side * grid.rows * grid.cols) as f64;
            if distance < least || (distance == least && area > half) {
                (best, least) = (grid, distance);
            }
        }
        best
    }
}

/// A special token that the tokenizer's settings name, by itself or in a list of such.
fn token(settings: &ImageSettings, key: &str, default: &str) -> String {
    let listed = || settings.tokenizer["extra_special_tokens"][key].as_str();
    let found = settings.token(key).or_else(|| listed().map(str::to_owned));
    found.unwrap_or_else(|| default.to_owned())
}

/// Pixels on a side of a patch.
fn patch(settings: &ImageSettings) -> Result<usize> {
    let value = &settings.model["vision_config"]["patch_size"];
    let patch = match value.is_null() {
        true => Some(14),
        false => side_of(value).filter(|patch| *patch <= MAX_PATCH),
    };
    let path = settings.path.with_file_name("config.json");
    patch.ok_or_else(|| {
        let why = format!("1 to {MAX_PATCH} expected, {value} found");
        Error::format(&path, "vision_config.patch_size", why)
    })
}

/// The side under `key`: a number, or equal `height` and `width`.
fn square(settings: &Settings, key: &str, default: usize) -> Result<usize> {
    let value = &settings.value[key];
    if !value.is_object() {
        return settings.integer(key, default, MAX_SIDE);
    }
    let inner = Settings {
        path: settings.path,
        value,
    };
    let height = inner.integer("height", default, MAX_SIDE)?;
    match inner.integer("width", default, MAX_SIDE)? == height {
        true => Ok(height),
        false => Err(settings.bad(key, "equal height and width")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::processor::image::lcg_image;
    use serde_json::json;
    use std::path::PathBuf;

    fn settings(images: Value, model: Value) -> ImageSettings {
        ImageSettings {
            path: PathBuf::from("preprocessor_config.json"),
            images,
            processor: json!({"image_seq_length": 4}),
            tokenizer: json!({"extra_special_tokens": {"start_image_token": "<begin>"}}),
            model,
        }
    }

    fn original(dynamic: bool) -> Value {
        json!({"force_image_size": 56, "dynamic_image_size": dynamic, "use_thumbnail": true,
            "min_dynamic_patch": 1, "max_dynamic_patch": 6, "downsample_ratio": 0.5,
            "vision_config": {"image_size": 28, "patch_size": 14}})
    }

    fn nearest(width: usize, height: usize, min: usize, max: usize) -> [usize; 2] {
        let grid = Grid::nearest(Size { height, width }, 448, min, max);
        [grid.cols, grid.rows]
    }

    #[test]
    fn the_grid_has_the_shape_of_the_image() {
        assert_eq!(nearest(800, 600, 1, 12), [4, 3]);
        assert_eq!(nearest(100, 1000, 1, 12), [1, 10]);
        // 1 × 1, 2 × 2 and 3 × 3 are equally near; a large image takes the largest it half fills.
        assert_eq!(nearest(300, 300, 1, 12), [1, 1]);
        assert_eq!(nearest(640, 640, 1, 12), [2, 2]);
        assert_eq!(nearest(2000, 2000, 1, 12), [3, 3]);
        assert_eq!(nearest(300, 300, 2, 3), [1, 2]);
        assert_eq!(nearest(300, 300, 5, 4), [1, 1]);
    }

    #[test]
    fn both_forms_cut_alike() {
        let images = json!({"image_processor_type": "GotOcr2ImageProcessor", "max_patches": 6,
            "size": {"height": 56, "width": 56},
            "image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD});
        let new = InternVlImages::transformers(&settings(images, original(true))).unwrap();
        let old = InternVlImages::opengvlab(&settings(Value::Null, original(true))).unwrap();
        let image = lcg_image(97, 150);
        let (a, b) = (new.vision_input(&image, 1), old.vision_input(&image, 1));
        let (a, b) = (a.unwrap(), b.unwrap());
        assert_eq!(a, b);
        assert_eq!((a.grid_thw, a.n_tokens), ([7, 4, 4], 28));
        assert!(old.prompt_text(&b).starts_with("<img><IMG_CONTEXT><IMG_"));
        assert!(new.prompt_text(&a).starts_with("<begin><IMG_CONTEXT>"));
        assert_eq!(
            [new.placeholder(), old.placeholder()],
            ["<IMG_CONTEXT>", "<image>"]
        );
    }

    #[test]
    fn an_image_may_stay_whole() {
        let whole = InternVlImages::opengvlab(&settings(Value::Null, original(false))).unwrap();
        let input = whole.vision_input(&lcg_image(30, 90), 1).unwrap();
        assert_eq!((input.grid_thw, input.n_tokens), ([1, 4, 4], 4));
        assert_eq!(input.tiling, None);
    }

    #[test]
    fn settings_that_cannot_be_name_their_key() {
        let kind = "GotOcr2ImageProcessor";
        for (key, images) in [
            (
                "size",
                json!({"image_processor_type": kind, "size": {"height": 5, "width": 6}}),
            ),
            (
                "max_patches",
                json!({"image_processor_type": kind, "max_patches": 0}),
            ),
            (
                "max_patches",
                json!({"image_processor_type": kind, "max_patches": 256, "size": 9999}),
            ),
            ("image processor", json!({})),
        ] {
            let error = InternVlImages::transformers(&settings(images, original(true)));
            let message = error.unwrap_err().to_string();
            assert!(message.contains(key), "{message}");
        }
        let mut model = original(true);
        model["vision_config"]["patch_size"] = json!([14, 16]);
        let error = InternVlImages::opengvlab(&settings(Value::Null, model)).unwrap_err();
        assert!(error.to_string().contains("patch_size"), "{error}");
    }
}
