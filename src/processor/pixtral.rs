//! The image side of Pixtral and Mistral Small 3: an image is shrunk until it lies within a square,
//! its sides are brought up to whole tokens, and every row of its tokens ends with a mark.
//!
//! Every operation runs in the order and the precision of transformers' Pillow backend, so the
//! patches are bit-identical to its `pixel_values`, cut by patches and without the zeros that
//! several images are padded with there.
//!
//! Source: arXiv:2410.07073 §2.2; transformers 5.23 `PixtralImageProcessorPil`, `PixtralProcessor`.

use crate::processor::image::RgbImage;
use crate::processor::resize::{Filter, resize};
use crate::processor::settings::{
    CHANNELS, CLIP_MEAN, CLIP_STD, ImageSettings, Settings, Size, ValueTable,
};
use crate::processor::{ImageProcessor, VisionInput, tiles};
use crate::{Error, Result};

/// Bounds of what a configuration may ask for, far above every published model.
const MAX_SIDE: usize = 1 << 14;
const MAX_PATCH: usize = 256;
const MAX_MERGE: usize = 16;
/// Values of one image, 8 GiB of them: each setting within its bounds, all together.
const MAX_VALUES: usize = 1 << 31;

/// What transformers takes for sides in pixels where the settings are silent.
const DEFAULT_PATCH: usize = 16;
const DEFAULT_EDGE: usize = 1024;

/// The image settings of one checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct PixtralImages {
    /// What an image is shrunk into; `None` if images stay as they are.
    within: Option<Size>,
    patch: usize,
    /// Patches per side that become one token.
    merge: usize,
    filter: Filter,
    values: ValueTable,
    tokens: Tokens,
}

/// What the prompt says for an image.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Tokens {
    /// One row of the tower's output, and what the template writes for an image.
    image: String,
    /// After a row of tokens.
    row_end: String,
    /// After the last row, in place of that.
    end: String,
}

impl PixtralImages {
    /// The settings of a checkpoint of Pixtral or Mistral Small 3 whose tower makes one token of
    /// `merge`² patches.
    ///
    /// # Errors
    /// [`Error::Format`] naming the key whose value cannot be or does not fit the tower;
    /// [`Error::Unsupported`] for another image processor, an unknown `resample` or a crop.
    pub fn open(settings: &ImageSettings, merge: usize) -> Result<Self> {
        settings.require_kind(&[
            "PixtralImageProcessor",
            "PixtralImageProcessorFast",
            "PixtralImageProcessorPil",
        ])?;
        let top = settings.of_images();
        if top.value["do_center_crop"] == true {
            return Err(Error::Unsupported {
                what: format!("{}: do_center_crop true", settings.path.display()),
            });
        }
        let resizes = top.flag("do_resize")?;
        Ok(Self {
            within: resizes.then(|| within(&top)).transpose()?,
            patch: patch(settings, merge)?,
            merge,
            filter: Filter::from_pillow(top.integer("resample", 3, 255)? as u64)?,
            values: ValueTable::read(&top, CLIP_MEAN, CLIP_STD)?,
            tokens: Tokens {
                image: token(settings, "image_token", "[IMG]"),
                row_end: token(settings, "image_break_token", "[IMG_BREAK]"),
                end: token(settings, "image_end_token", "[IMG_END]"),
            },
        })
    }

    /// The size in pixels that an image of `size` is brought to.
    fn target(&self, size: Size) -> Result<Size> {
        let unit = self.patch * self.merge;
        let to = match self.within {
            Some(within) => whole_tokens(size, within, unit),
            None => size,
        };
        let n_values = to.height.checked_mul(to.width);
        let n_values = n_values.and_then(|n| n.checked_mul(CHANNELS));
        let why = match n_values {
            _ if to.height < unit || to.width < unit => {
                format!("a token has {unit}x{unit} pixels, and not one is left")
            }
            Some(n) if n <= MAX_VALUES => return Ok(to),
            _ => format!("more than {MAX_VALUES} values"),
        };
        Err(Error::Invalid {
            what: format!(
                "image of {}x{} pixels, {}x{} as the model takes it",
                size.width, size.height, to.width, to.height
            ),
            why,
        })
    }
}

/// The size of whole tokens of `unit`² pixels for an image of `size`, which is shrunk into `within`
/// first where it is larger; zero if nothing is left of a side.
fn whole_tokens(size: Size, within: Size, unit: usize) -> Size {
    let (height, width) = (size.height as f64, size.width as f64);
    let ratio = (height / within.height as f64).max(width / within.width as f64);
    let up = |side: usize| side.div_ceil(unit).saturating_mul(unit);
    match ratio > 1.0 {
        true => Size {
            height: up((height / ratio).floor() as usize),
            width: up((width / ratio).floor() as usize),
        },
        false => Size {
            height: up(size.height),
            width: up(size.width),
        },
    }
}

impl ImageProcessor for PixtralImages {
    fn vision_input(&self, image: &RgbImage, _: usize) -> Result<VisionInput> {
        image.check()?;
        let to = self.target(Size {
            height: image.height,
            width: image.width,
        })?;
        let image = resize(image, to.width, to.height, self.filter)?;
        let (rows, cols) = tiles::grid_of(std::slice::from_ref(&image), self.patch);
        Ok(VisionInput {
            patches: tiles::patches(&[image], self.patch, &self.values)?,
            grid_thw: [1, rows, cols],
            n_tokens: (rows / self.merge) * (cols / self.merge),
            tiling: None,
        })
    }

    fn placeholder(&self) -> &str {
        &self.tokens.image
    }

    fn image_token(&self) -> &str {
        &self.tokens.image
    }

    fn prompt_text(&self, image: &VisionInput) -> String {
        let [_, rows, cols] = image.grid_thw.map(|patches| patches / self.merge);
        let Tokens {
            image,
            row_end,
            end,
        } = &self.tokens;
        vec![image.repeat(cols); rows].join(row_end) + end
    }
}

/// The longest sides under `size`: `longest_edge` for both, or `height` and `width`.
fn within(settings: &Settings) -> Result<Size> {
    let value = &settings.value["size"];
    let size = Settings {
        path: settings.path,
        value,
    };
    let sides = match value.is_object() {
        false => [settings.integer("size", DEFAULT_EDGE, MAX_SIDE)?; 2],
        true if !value["longest_edge"].is_null() => {
            [size.integer("longest_edge", DEFAULT_EDGE, MAX_SIDE)?; 2]
        }
        true if value["height"].is_null() || value["width"].is_null() => {
            return Err(settings.bad("size", "longest_edge, or height and width,"));
        }
        true => [
            size.integer("height", DEFAULT_EDGE, MAX_SIDE)?,
            size.integer("width", DEFAULT_EDGE, MAX_SIDE)?,
        ],
    };
    Ok(Size {
        height: sides[0],
        width: sides[1],
    })
}

/// The side of a patch, after a look at whether processor and tower agree on it and on `merge`.
fn patch(settings: &ImageSettings, merge: usize) -> Result<usize> {
    let path = settings.path.with_file_name("processor_config.json");
    let processor = Settings {
        path: &path,
        value: &settings.processor,
    };
    let model = settings.path.with_file_name("config.json");
    let tower = Settings {
        path: &model,
        value: &settings.model["vision_config"],
    };
    let expected = tower.integer("patch_size", DEFAULT_PATCH, MAX_PATCH)?;
    let patch = processor.integer("patch_size", DEFAULT_PATCH, MAX_PATCH)?;
    if patch != expected {
        let why = format!("{expected}, as the tower has, expected, {patch} found");
        return Err(Error::format(&path, "patch_size", why));
    }
    let found = processor.integer("spatial_merge_size", 1, MAX_MERGE)?;
    if found != merge {
        let why = format!("{merge}, as the projector has, expected, {found} found");
        return Err(Error::format(&path, "spatial_merge_size", why));
    }
    Ok(patch)
}

/// A token's text that the processor's settings name, or the usual one.
fn token(settings: &ImageSettings, key: &str, usual: &str) -> String {
    let named = settings.processor[key].as_str();
    named.unwrap_or(usual).to_owned()
}

/// Patches per side that become one token, by the model's configuration.
///
/// # Errors
/// [`Error::Format`] if it is no size.
pub fn merge_size(settings: &ImageSettings) -> Result<usize> {
    let path = settings.path.with_file_name("config.json");
    let model = Settings {
        path: &path,
        value: &settings.model,
    };
    model.integer("spatial_merge_size", 2, MAX_MERGE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::processor::image::lcg_image;
    use serde_json::{Value, json};

    fn settings(images: Value) -> ImageSettings {
        let mut images = images;
        images["image_processor_type"] = "PixtralImageProcessorFast".into();
        ImageSettings {
            path: "preprocessor_config.json".into(),
            images,
            processor: json!({"patch_size": 14, "spatial_merge_size": 2,
                "image_break_token": "[ROW]"}),
            tokenizer: Value::Null,
            model: json!({"vision_config": {"patch_size": 14}, "spatial_merge_size": 2}),
        }
    }

    fn images(settings: &ImageSettings) -> Result<PixtralImages> {
        PixtralImages::open(settings, merge_size(settings)?)
    }

    /// Expected sizes are those of transformers' `get_resize_output_image_size`.
    #[test]
    fn sizes_equal_those_of_transformers() {
        for ([height, width], edge, unit, expected) in [
            ([97, 211], 1024, 16, [112, 224]),
            ([1, 1], 1024, 16, [16, 16]),
            ([1024, 1024], 1024, 16, [1024, 1024]),
            ([1025, 1024], 1024, 16, [1024, 1024]),
            ([3000, 2001], 1540, 28, [1540, 1036]),
            ([2001, 3000], 1540, 28, [1036, 1540]),
            ([1, 5000], 1024, 16, [0, 1024]),
            ([700, 699], 100, 28, [112, 112]),
        ] {
            let [within, size] =
                [[edge, edge], [height, width]].map(|[height, width]| Size { height, width });
            let found = whole_tokens(size, within, unit);
            assert_eq!([found.height, found.width], expected, "{height}x{width}");
        }
    }

    #[test]
    fn every_row_of_tokens_ends_with_a_mark() {
        let images = images(&settings(json!({"size": {"longest_edge": 100}}))).unwrap();
        let found = images.vision_input(&lcg_image(80, 40), 1).unwrap();
        assert_eq!((found.grid_thw, found.n_tokens), ([1, 4, 6], 6));
        let row = "[IMG][IMG][IMG]";
        assert_eq!(
            images.prompt_text(&found),
            format!("{row}[ROW]{row}[IMG_END]")
        );
    }

    #[test]
    fn an_image_that_stays_as_it_is_loses_what_fills_no_patch() {
        let images = images(&settings(json!({"do_resize": false}))).unwrap();
        let found = images.vision_input(&lcg_image(80, 45), 1).unwrap();
        assert_eq!((found.grid_thw, found.n_tokens), ([1, 3, 5], 2));
        assert_eq!([found.patches.rows(), found.patches.cols()], [15, 588]);
        let small = images.vision_input(&lcg_image(80, 27), 1).unwrap_err();
        assert!(small.to_string().contains("28x28"), "{small}");
    }

    #[test]
    fn an_image_of_which_nothing_is_left_is_refused() {
        let images = images(&settings(json!({}))).unwrap();
        assert!(images.vision_input(&lcg_image(5000, 1), 1).is_err());
    }

    #[test]
    fn what_cannot_be_names_its_key() {
        for (key, value) in [
            ("do_center_crop", json!(true)),
            ("size", json!({"shortest_edge": 3})),
            ("longest_edge", json!({"longest_edge": 0})),
            ("resample", json!("bicubic")),
        ] {
            let at = if key == "longest_edge" { "size" } else { key };
            let error = images(&settings(json!({at: value}))).unwrap_err();
            assert!(error.to_string().contains(key), "{error}");
        }
        for key in ["patch_size", "spatial_merge_size"] {
            let mut other = settings(json!({}));
            other.processor[key] = 7.into();
            let error = images(&other).unwrap_err();
            assert!(error.to_string().contains(key), "{error}");
        }
    }
}
