//! The image side of Gemma 3: every image is brought to one square size, whatever its shape, and
//! stands in the prompt as a fixed number of tokens between two marks and blank lines.
//!
//! The template writes the opening mark alone; the blank lines come with the tokens, so they meet
//! the template's own line breaks before anything is tokenized: the one after the name of the role
//! and the two before the mark are one token of three line breaks in Gemma's vocabulary.
//!
//! Source: transformers 5.23 `Gemma3ImageProcessorPil`, `Gemma3Processor`.

use crate::processor::image::RgbImage;
use crate::processor::resize::{Filter, resize};
use crate::processor::settings::{CHANNELS, ImageSettings, Settings, Size, ValueTable};
use crate::processor::{ImageProcessor, VisionInput, tiles};
use crate::{Error, Result};
use serde_json::Value;

/// Bounds of what a configuration may ask for, far above every published model.
const MAX_SIDE: usize = 1 << 14;
const MAX_PATCH: usize = 256;
const MAX_TOKENS: usize = 1 << 20;

/// Mean and deviation that bring bytes to −1 … 1.
const HALF: [f64; CHANNELS] = [0.5; CHANNELS];

/// The image settings of one checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct Gemma3Images {
    /// The size that images are brought to, unless they come in it.
    size: Option<Size>,
    patch: usize,
    n_tokens: usize,
    filter: Filter,
    values: ValueTable,
    tokens: Tokens,
}

/// The special tokens around and inside an image.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Tokens {
    begin: String,
    image: String,
    end: String,
}

impl Gemma3Images {
    /// The settings of a checkpoint.
    ///
    /// # Errors
    /// [`Error::Format`] naming the key whose value cannot be; [`Error::Unsupported`] for another
    /// image processor, an unknown `resample`, and `do_pan_and_scan`.
    pub fn open(settings: &ImageSettings) -> Result<Self> {
        settings.require_kind(&[
            "Gemma3ImageProcessor",
            "Gemma3ImageProcessorFast",
            "Gemma3ImageProcessorPil",
        ])?;
        let top = settings.of_images();
        refuse_crops(&top)?;
        let token = |key: &str, default: &str| {
            let found = settings.token(key);
            found.unwrap_or_else(|| default.to_owned())
        };
        let resizes = top.flag("do_resize")?;
        Ok(Self {
            size: resizes.then(|| size(&top)).transpose()?,
            patch: patch_size(settings)?,
            n_tokens: n_tokens(settings)?,
            filter: Filter::from_pillow(top.integer("resample", 2, 255)? as u64)?,
            values: ValueTable::read(&top, HALF, HALF)?,
            tokens: Tokens {
                begin: token("boi_token", "<start_of_image>"),
                image: token("image_token", "<image_soft_token>"),
                end: token("eoi_token", "<end_of_image>"),
            },
        })
    }
}

impl ImageProcessor for Gemma3Images {
    fn vision_input(&self, image: &RgbImage, _: usize) -> Result<VisionInput> {
        image.check()?;
        let view = match self.size {
            Some(Size { height, width }) => resize(image, width, height, self.filter)?,
            None => image.clone(),
        };
        let view = [view];
        let (rows, cols) = tiles::grid_of(&view, self.patch);
        Ok(VisionInput {
            patches: tiles::patches(&view, self.patch, &self.values)?,
            grid_thw: [1, rows, cols],
            n_tokens: self.n_tokens,
            tiling: None,
        })
    }

    fn placeholder(&self) -> &str {
        &self.tokens.begin
    }

    fn image_token(&self) -> &str {
        &self.tokens.image
    }

    fn prompt_text(&self, image: &VisionInput) -> String {
        let Tokens {
            begin,
            image: token,
            end,
        } = &self.tokens;
        format!("\n\n{begin}{}{end}\n\n", token.repeat(image.n_tokens))
    }
}

/// transformers' processor never cuts an image because a file says so, only where its caller does:
/// a folder that asks for it has been used otherwise than it says.
fn refuse_crops(settings: &Settings) -> Result<()> {
    match &settings.value["do_pan_and_scan"] {
        Value::Null | Value::Bool(false) => Ok(()),
        Value::Bool(true) => Err(Error::Unsupported {
            what: format!(
                "{}: do_pan_and_scan: true; images are seen in one view, as transformers' processor \
                 shows them unless a call asks for more: set it to false",
                settings.path.display()
            ),
        }),
        _ => Err(settings.bad("do_pan_and_scan", "true or false")),
    }
}

/// `size`: a height and a width, or one number for both.
fn size(settings: &Settings) -> Result<Size> {
    const SIDE: usize = 224;
    let value = &settings.value["size"];
    let inner = Settings {
        path: settings.path,
        value,
    };
    let side = |key: &str| match value {
        Value::Object(sides) if !sides.contains_key(key) => {
            Err(settings.bad("size", "height and width"))
        }
        Value::Object(_) => inner.integer(key, SIDE, MAX_SIDE),
        _ => settings.integer("size", SIDE, MAX_SIDE),
    };
    Ok(Size {
        height: side("height")?,
        width: side("width")?,
    })
}

fn patch_size(settings: &ImageSettings) -> Result<usize> {
    let tower = Settings {
        path: &settings.path.with_file_name("config.json"),
        value: &settings.model["vision_config"],
    };
    tower.integer("patch_size", 16, MAX_PATCH)
}

fn n_tokens(settings: &ImageSettings) -> Result<usize> {
    let joint = Settings {
        path: &settings.path.with_file_name("processor_config.json"),
        value: &settings.processor,
    };
    joint.integer("image_seq_length", 256, MAX_TOKENS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::processor::image::lcg_image;
    use serde_json::json;
    use std::path::PathBuf;

    fn settings(images: Value, processor: Value) -> ImageSettings {
        ImageSettings {
            path: PathBuf::from("preprocessor_config.json"),
            images,
            processor,
            tokenizer: json!({"eoi_token": {"content": "<end>"}}),
            model: json!({"vision_config": {"patch_size": 4}}),
        }
    }

    #[test]
    fn an_image_is_a_fixed_number_of_tokens_between_marks_and_blank_lines() {
        let kind = "Gemma3ImageProcessor";
        let value = json!({"image_processor_type": kind, "size": {"height": 8, "width": 8}});
        let images = Gemma3Images::open(&settings(value, json!({"image_seq_length": 2}))).unwrap();
        let input = images.vision_input(&lcg_image(31, 5), 1).unwrap();
        assert_eq!((input.grid_thw, input.n_tokens), ([1, 2, 2], 2));
        assert_eq!((input.patches.rows(), input.patches.cols()), (4, 48));
        let expected = "\n\n<start_of_image><image_soft_token><image_soft_token><end>\n\n";
        assert_eq!(images.prompt_text(&input), expected);
        assert_eq!(images.placeholder(), "<start_of_image>");
    }

    #[test]
    fn what_is_not_handled_is_named() {
        for (key, value) in [
            ("do_pan_and_scan", json!(true)),
            ("do_pan_and_scan", json!("yes")),
            ("size", json!({"shortest_edge": 8})),
            ("size", json!("big")),
            ("size", json!({"height": 8, "width": 0})),
        ] {
            let mut images = json!({"image_processor_type": "Gemma3ImageProcessorFast"});
            images[key] = value;
            let error = Gemma3Images::open(&settings(images, Value::Null)).unwrap_err();
            let message = error.to_string();
            assert!(message.contains("preprocessor_config.json"), "{message}");
            assert!(
                message.contains(key) || message.contains("width"),
                "{message}"
            );
        }
        let other = json!({"image_processor_type": "CLIPImageProcessor"});
        assert!(Gemma3Images::open(&settings(other, Value::Null)).is_err());
    }
}
