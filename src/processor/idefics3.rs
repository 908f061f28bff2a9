//! The image side of Idefics3 and SmolVLM: an image is enlarged to whole tiles, cut into them row
//! by row, and followed by a view of all of it in the size of one tile; an image of one tile, and any
//! if splitting is off, is that tile alone. Each tile is a picture of its own in the prompt.
//!
//! Every operation runs in the order and the precision of transformers' Pillow backend, so the
//! patches are bit-identical to its `pixel_values`, cut by patches. Pixels beyond the last whole
//! patch of a tile are left out, as the tower's convolution leaves them out.
//!
//! Source: arXiv:2408.12637 §3.2; transformers 5.23 `Idefics3ImageProcessorPil`,
//! `SmolVLMImageProcessorPil`, `Idefics3Processor` and `SmolVLMProcessor`.

use super::token_text;
use crate::processor::image::RgbImage;
use crate::processor::resize::{Filter, resize};
use crate::processor::settings::{CHANNELS, ImageSettings, Settings, Size, ValueTable};
use crate::processor::tiles::{cut, patches};
use crate::processor::{ImageProcessor, Tiling, VisionInput};
use crate::{Error, Result};

/// No side of a resized image is longer, whatever the settings say.
const MAX_RESIZED: usize = 4096;
/// Bounds of what a configuration may ask for, far above every published model.
const MAX_SIDE: usize = 1 << 14;
const MAX_TOKENS: usize = 1 << 20;
/// Values of one image's tiles, 8 GiB of them.
const MAX_VALUES: usize = 1 << 31;
/// Mean and deviation of each channel where the settings name none.
const MIDDLE: [f64; CHANNELS] = [0.5; CHANNELS];

/// The tokens that stand around the tokens of an image, and those themselves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PromptTokens {
    /// Before each tile and after the last.
    pub around: String,
    /// One row of the tower's output, and what the template writes for an image.
    pub image: String,
    /// Before the view of the whole image.
    pub whole: String,
}

impl Default for PromptTokens {
    fn default() -> Self {
        Self {
            around: "<fake_token_around_image>".to_owned(),
            image: "<image>".to_owned(),
            whole: "<global-img>".to_owned(),
        }
    }
}

impl PromptTokens {
    /// Those that the tokenizer's settings name, else the usual ones.
    pub fn read(settings: &ImageSettings) -> Self {
        let usual = Self::default();
        let named = |key: &str| {
            let inner = &settings.tokenizer["extra_special_tokens"][key];
            token_text(inner).or_else(|| settings.token(key))
        };
        Self {
            around: named("fake_image_token").unwrap_or(usual.around),
            image: named("image_token").unwrap_or(usual.image),
            whole: named("global_image_token").unwrap_or(usual.whole),
        }
    }
}

/// The image settings of one checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct Preprocessor {
    /// What an image is brought to first, if to anything.
    first_size: Option<FirstSize>,
    splits: bool,
    /// Pixels on a side of a tile.
    tile: usize,
    /// Pixels on a side of a patch.
    patch: usize,
    /// Tokens of a tile.
    n_tokens: usize,
    filter: Filter,
    values: ValueTable,
    tokens: PromptTokens,
}

/// What an image is brought to before it is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FirstSize {
    LongestEdge(usize),
    Exact(Size),
}

impl ImageProcessor for Preprocessor {
    fn vision_input(&self, image: &RgbImage, _: usize) -> Result<VisionInput> {
        image.check()?;
        let (tiles, tiling) = self.tiles(image)?;
        let side = self.tile / self.patch;
        Ok(VisionInput {
            patches: patches(&tiles, self.patch, &self.values)?,
            grid_thw: [tiles.len(), side, side],
            n_tokens: tiles.len() * self.n_tokens,
            tiling,
        })
    }

    fn placeholder(&self) -> &str {
        &self.tokens.image
    }

    fn image_token(&self) -> &str {
        &self.tokens.image
    }

    fn prompt_text(&self, image: &VisionInput) -> String {
        let PromptTokens {
            around,
            image: token,
            whole,
        } = &self.tokens;
        let tokens = token.repeat(self.n_tokens);
        let mut text = String::new();
        if let Some(tiling) = image.tiling {
            for row in 1..=tiling.rows {
                for col in 1..=tiling.cols {
                    text += &format!("{around}<row_{row}_col_{col}>{tokens}");
                }
                text.push('\n');
            }
            text.push('\n');
        }
        text + &format!("{around}{whole}{tokens}{around}")
    }
}

impl Preprocessor {
    /// The settings of a checkpoint of Idefics3 or SmolVLM.
    ///
    /// # Errors
    /// [`Error::Format`] naming the key whose value is of another type or out of range, or does not
    /// fit the tower; [`Error::Unsupported`] for another image processor or `resample`.
    pub fn open(settings: &ImageSettings, tokens: PromptTokens) -> Result<Self> {
        settings.require_kind(&[
            "Idefics3ImageProcessor",
            "Idefics3ImageProcessorFast",
            "Idefics3ImageProcessorPil",
            "SmolVLMImageProcessor",
            "SmolVLMImageProcessorFast",
            "SmolVLMImageProcessorPil",
        ])?;
        let top = settings.of_images();
        let tile = inner(&top, "max_image_size").integer("longest_edge", 364, MAX_SIDE)?;
        let patch = patch_size(settings, tile)?;
        let first_size = match top.flag("do_resize")? {
            true => Some(FirstSize::read(&inner(&top, "size"))?),
            false => None,
        };
        Ok(Self {
            first_size,
            splits: top.flag("do_image_splitting")?,
            tile,
            patch,
            n_tokens: n_tokens(settings, tile / patch)?,
            filter: Filter::from_pillow(top.integer("resample", 1, 255)? as u64)?,
            values: ValueTable::read(&top, MIDDLE, MIDDLE)?,
            tokens,
        })
    }

    /// The tiles of an image, the view of all of it last, and how it was cut if it was.
    fn tiles(&self, image: &RgbImage) -> Result<(Vec<RgbImage>, Option<Tiling>)> {
        let tile = self.tile;
        let resized = |image: &RgbImage, to: Size| resize(image, to.width, to.height, self.filter);
        let whole = Size {
            height: tile,
            width: tile,
        };
        let first = match self.first_size {
            Some(first) => &resized(image, first.of(image))?,
            None => image,
        };
        if !self.splits {
            return Ok((vec![resized(first, whole)?], None));
        }
        let to = self.whole_tiles(first)?;
        let large = resized(first, to)?;
        if to == whole {
            return Ok((vec![large], None));
        }
        let mut tiles = cut(&large, tile);
        tiles.push(resized(&large, whole)?);
        let tiling = Tiling {
            rows: to.height / tile,
            cols: to.width / tile,
            height: image.height,
            width: image.width,
        };
        Ok((tiles, Some(tiling)))
    }

    /// The size of whole tiles that an image is enlarged to: the longer side to the next multiple,
    /// the other along with it and then to its own.
    fn whole_tiles(&self, image: &RgbImage) -> Result<Size> {
        let tile = self.tile;
        let aspect = image.width as f64 / image.height as f64;
        let up = |side: usize| side.div_ceil(tile).saturating_mul(tile);
        let size = if image.width >= image.height {
            let width = up(image.width);
            let height = up((width as f64 / aspect) as usize);
            Size { height, width }
        } else {
            let height = up(image.height);
            let width = up((height as f64 * aspect) as usize);
            Size { height, width }
        };
        let n_pixels = size.height.saturating_mul(size.width);
        if n_pixels <= MAX_VALUES / CHANNELS {
            return Ok(size);
        }
        Err(Error::Invalid {
            what: format!("image of {}x{} pixels", image.width, image.height),
            why: format!(
                "its tiles, {}x{} pixels in all, are more than {MAX_VALUES} values",
                size.width, size.height
            ),
        })
    }
}

impl FirstSize {
    fn read(size: &Settings) -> Result<Self> {
        let has = |key: &str| !size.value[key].is_null();
        if !has("longest_edge") && has("height") && has("width") {
            return Ok(Self::Exact(Size {
                height: size.integer("height", 1, MAX_SIDE)?,
                width: size.integer("width", 1, MAX_SIDE)?,
            }));
        }
        let edge = size.integer("longest_edge", 4 * 364, MAX_SIDE)?;
        Ok(Self::LongestEdge(edge))
    }

    /// The size that an image is brought to. A shorter side is made even, and after that no side
    /// stays above [`MAX_RESIZED`].
    fn of(self, image: &RgbImage) -> Size {
        let edge = match self {
            Self::Exact(size) => return size,
            Self::LongestEdge(edge) => edge,
        };
        let (height, width) = (image.height, image.width);
        let even = |side: f64| (side as usize + side as usize % 2).max(1);
        let aspect = width as f64 / height as f64;
        let (height, width) = match width >= height {
            true => (even(edge as f64 / aspect), edge),
            false => (edge, even(edge as f64 * aspect)),
        };
        let aspect = width as f64 / height as f64;
        let bound = MAX_RESIZED as f64;
        let (height, width) = match width >= height {
            true if width > MAX_RESIZED => ((bound / aspect) as usize, MAX_RESIZED),
            false if height > MAX_RESIZED => (MAX_RESIZED, (bound * aspect) as usize),
            _ => (height, width),
        };
        Size {
            height: height.max(1),
            width: width.max(1),
        }
    }
}

/// The object under `key`, or nothing.
fn inner<'a>(settings: &Settings<'a>, key: &str) -> Settings<'a> {
    Settings {
        path: settings.path,
        value: &settings.value[key],
    }
}

/// The side of a patch, after a look at whether a tile has as many as the tower's positions.
fn patch_size(settings: &ImageSettings, tile: usize) -> Result<usize> {
    let path = settings.path.with_file_name("config.json");
    let tower = Settings {
        path: &path,
        value: &settings.model["vision_config"],
    };
    let patch = tower.integer("patch_size", 32, MAX_SIDE)?;
    let image_size = tower.integer("image_size", 224, MAX_SIDE)?;
    if tile / patch == image_size / patch && tile >= patch {
        return Ok(patch);
    }
    Err(Error::Unsupported {
        what: format!(
            "{}: max_image_size of {tile} pixels for a tower with an image_size of {image_size}; \
             both must hold as many patches of {patch} pixels",
            settings.path.display()
        ),
    })
}

/// Tokens of a tile of `side`² patches, after a look at whether the processor's settings agree.
fn n_tokens(settings: &ImageSettings, side: usize) -> Result<usize> {
    let path = settings.path.with_file_name("config.json");
    let model = Settings {
        path: &path,
        value: &settings.model,
    };
    let scale_factor = model.integer("scale_factor", 2, MAX_SIDE)?;
    let expected = side * side / (scale_factor * scale_factor);
    let path = settings.path.with_file_name("processor_config.json");
    let processor = Settings {
        path: &path,
        value: &settings.processor,
    };
    match processor.integer("image_seq_len", 169, MAX_TOKENS)? {
        found if found == expected => Ok(found),
        found => {
            let why = format!("{expected}, as the tower gives, expected, {found} found");
            Err(Error::format(&path, "image_seq_len", why))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::processor::image::lcg_image;
    use serde_json::{Value, json};

    fn settings(images: Value) -> ImageSettings {
        let mut images = images;
        images["image_processor_type"] = "Idefics3ImageProcessor".into();
        ImageSettings {
            path: "preprocessor_config.json".into(),
            images,
            processor: json!({"image_seq_len": 4}),
            tokenizer: Value::Null,
            model: json!({"vision_config": {"patch_size": 4, "image_size": 17}, "scale_factor": 2}),
        }
    }

    fn preprocessor(images: Value) -> Preprocessor {
        Preprocessor::open(&settings(images), PromptTokens::default()).unwrap()
    }

    fn tiles_of_16(edge: usize) -> Preprocessor {
        preprocessor(json!({"max_image_size": {"longest_edge": 16},
            "size": {"longest_edge": edge}}))
    }

    fn size_of(first: FirstSize, height: usize, width: usize) -> [usize; 2] {
        let data = Vec::new();
        let image = RgbImage {
            width,
            height,
            data,
        };
        let size = first.of(&image);
        [size.height, size.width]
    }

    /// Expected values are those of transformers' `get_resize_output_image_size`.
    #[test]
    fn the_longest_edge_is_met_and_the_other_made_even() {
        let first = FirstSize::LongestEdge;
        assert_eq!(size_of(first(1456), 211, 97), [1456, 670]);
        assert_eq!(size_of(first(1456), 97, 211), [670, 1456]);
        assert_eq!(size_of(first(100), 3, 3000), [1, 100]);
        assert_eq!(size_of(first(100), 1, 30_000), [1, 100]);
        assert_eq!(size_of(first(8192), 1000, 2000), [2048, 4096]);
        assert_eq!(size_of(first(8192), 2000, 1000), [4096, 2048]);
    }

    #[test]
    fn tiles_are_cut_row_by_row_and_the_whole_comes_last() {
        let found = tiles_of_16(40).vision_input(&lcg_image(30, 60), 1).unwrap();
        let tiling = found.tiling.unwrap();
        assert_eq!([tiling.rows, tiling.cols], [3, 2]);
        assert_eq!([tiling.height, tiling.width], [60, 30]);
        assert_eq!(found.grid_thw, [7, 4, 4]);
        assert_eq!(found.n_tokens, 28);
        assert_eq!([found.patches.rows(), found.patches.cols()], [7 * 16, 48]);
    }

    #[test]
    fn an_image_of_one_tile_is_not_cut() {
        let image = lcg_image(30, 60);
        for processor in [
            tiles_of_16(16),
            preprocessor(json!({"max_image_size": {"longest_edge": 16},
                "do_image_splitting": false})),
        ] {
            let found = processor.vision_input(&image, 1).unwrap();
            assert_eq!((found.grid_thw, found.tiling), ([1, 4, 4], None));
            let tokens = "<image>".repeat(4);
            let around = "<fake_token_around_image>";
            let expected = format!("{around}<global-img>{tokens}{around}");
            assert_eq!(processor.prompt_text(&found), expected);
        }
    }

    #[test]
    fn the_prompt_names_rows_and_columns() {
        let processor = tiles_of_16(32);
        let found = processor.vision_input(&lcg_image(30, 30), 1).unwrap();
        let text = processor.prompt_text(&found);
        let text = text.replace(&"<image>".repeat(4), "I");
        let text = text.replace("<fake_token_around_image>", "|");
        let expected = "|<row_1_col_1>I|<row_1_col_2>I\n|<row_2_col_1>I|<row_2_col_2>I\n\n\
                        |<global-img>I|";
        assert_eq!(text, expected);
    }

    #[test]
    fn tokens_are_those_that_the_tokenizer_names() {
        let mut named = settings(json!({}));
        named.tokenizer = json!({"image_token": "<im>", "global_image_token": "<all>",
            "extra_special_tokens": {"image_token": "<picture>"}});
        let tokens = PromptTokens::read(&named);
        assert_eq!(tokens.image, "<picture>");
        assert_eq!(tokens.whole, "<all>");
        assert_eq!(tokens.around, "<fake_token_around_image>");
    }

    #[test]
    fn tiles_that_the_tower_has_no_positions_for_are_refused() {
        let wrong = settings(json!({"max_image_size": {"longest_edge": 20}}));
        let error = Preprocessor::open(&wrong, PromptTokens::default()).unwrap_err();
        assert!(error.to_string().contains("max_image_size"), "{error}");
    }
}
