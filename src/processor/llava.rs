//! The image side of LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision: one view of a fixed size, to which
//! the later two add tiles of the image at a higher resolution.
//!
//! Source: transformers 5.23 `CLIPImageProcessorPil`, `LlavaNextImageProcessorPil`,
//! `LlavaOnevisionImageProcessorPil` and the processors around them.

use crate::processor::anyres::{Packing, best_resolution, size_within};
use crate::processor::image::RgbImage;
use crate::processor::resize::{Filter, resize};
use crate::processor::settings::{CLIP_MEAN, CLIP_STD, ImageSettings, Settings, Size, ValueTable};
use crate::processor::{ImageProcessor, Tiling, VisionInput, tiles};
use crate::{Error, Result};

/// Bound of a side in pixels.
const MAX_SIDE: usize = 1 << 14;

/// What is made of an image.
#[derive(Clone, Debug, PartialEq)]
enum Views {
    /// Brought to a size, its middle cut out.
    Centre {
        resized: Option<Resized>,
        crop: Option<Size>,
    },
    /// A whole view and the tiles of the best of these resolutions.
    Tiles {
        resolutions: Vec<Size>,
        packing: Packing,
        /// Of several images, each is padded to a square in this colour and given in one view.
        only_alone: Option<[u8; 3]>,
    },
}

/// What a single view is resized to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Resized {
    /// Its shorter side to this, the aspect ratio kept.
    Shortest(usize),
    /// To this square, whatever its shape.
    Square(usize),
}

/// The image settings of one checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct LlavaImages {
    views: Views,
    /// Side of a tile in pixels.
    tile: usize,
    patch: usize,
    /// Whether the tower's class token is among the features.
    keeps_class: bool,
    filter: Filter,
    values: ValueTable,
    image_token: String,
}

/// What the model's configuration says that images depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TowerSettings {
    /// Pixels on a side of a patch.
    pub patch: usize,
    /// Whether the tower has a class token that stays among the features.
    pub keeps_class: bool,
}

impl LlavaImages {
    /// The settings of a LLaVA-1.5 checkpoint.
    ///
    /// # Errors
    /// [`Error::Format`] naming the key whose value cannot be; [`Error::Unsupported`] for another
    /// image processor or an unknown `resample`.
    pub fn single(settings: &ImageSettings, tower: TowerSettings) -> Result<Self> {
        settings.require_kind(&[
            "CLIPImageProcessor",
            "CLIPImageProcessorFast",
            "CLIPImageProcessorPil",
            "BitImageProcessor",
            "BitImageProcessorFast",
            "BitImageProcessorPil",
            "SiglipImageProcessor",
            "SiglipImageProcessorFast",
            "SiglipImageProcessorPil",
        ])?;
        let top = settings.of_images();
        let crops = top.flag("do_center_crop")? && !top.value["crop_size"].is_null();
        let crop = match crops {
            true => Some(square(&top, "crop_size", 224)?),
            false => None,
        };
        let side = side(&top, "size", 224)?;
        let is_square = !top.value["size"]["height"].is_null();
        let resized = match (top.flag("do_resize")?, is_square) {
            (true, true) => Some(Resized::Square(side)),
            (true, false) => Some(Resized::Shortest(side)),
            (false, _) => None,
        };
        let tile = crop.map_or(side, |crop| crop.height);
        let views = Views::Centre { resized, crop };
        Self::new(settings, tower, views, tile)
    }

    /// The settings of a LLaVA-NeXT checkpoint.
    ///
    /// # Errors
    /// As [`LlavaImages::single`].
    pub fn next(settings: &ImageSettings, tower: TowerSettings) -> Result<Self> {
        settings.require_kind(&[
            "LlavaNextImageProcessor",
            "LlavaNextImageProcessorFast",
            "LlavaNextImageProcessorPil",
        ])?;
        let top = settings.of_images();
        let tile = side(&top, "size", 224)?;
        let views = Views::Tiles {
            resolutions: resolutions(&top)?,
            packing: packing(tile, tower, None),
            only_alone: None,
        };
        Self::new(settings, tower, views, tile)
    }

    /// The settings of a LLaVA-OneVision checkpoint.
    ///
    /// # Errors
    /// As [`LlavaImages::single`].
    pub fn onevision(settings: &ImageSettings, tower: TowerSettings) -> Result<Self> {
        settings.require_kind(&[
            "LlavaOnevisionImageProcessor",
            "LlavaOnevisionImageProcessorFast",
            "LlavaOnevisionImageProcessorPil",
        ])?;
        let top = settings.of_images();
        let tile = side(&top, "size", 384)?;
        let mean = top.channels("image_mean", CLIP_MEAN)?;
        let views = Views::Tiles {
            resolutions: resolutions(&top)?,
            packing: packing(tile, tower, Some(max_tiles(settings)?)),
            only_alone: Some(mean.map(|m| (f64::from(m) * 255.0) as u8)),
        };
        Self::new(settings, tower, views, tile)
    }

    fn new(
        settings: &ImageSettings,
        tower: TowerSettings,
        views: Views,
        tile: usize,
    ) -> Result<Self> {
        let top = settings.of_images();
        let named = settings.processor["image_token"].as_str();
        let token = settings.token("image_token");
        Ok(Self {
            views,
            tile,
            patch: tower.patch,
            keeps_class: tower.keeps_class,
            filter: Filter::from_pillow(top.integer("resample", 3, 255)? as u64)?,
            values: ValueTable::read(&top, CLIP_MEAN, CLIP_STD)?,
            image_token: token.unwrap_or_else(|| named.unwrap_or("<image>").to_owned()),
        })
    }

    fn to_square(&self, image: &RgbImage) -> Result<RgbImage> {
        resize(image, self.tile, self.tile, self.filter)
    }

    /// The middle of the image, which is resized first.
    fn centre(
        &self,
        image: &RgbImage,
        resized: Option<Resized>,
        size: Option<Size>,
    ) -> Result<RgbImage> {
        let image = match resized {
            None => image.clone(),
            Some(Resized::Square(side)) => resize(image, side, side, self.filter)?,
            Some(Resized::Shortest(short)) => {
                let (least, most) = (image.width.min(image.height), image.width.max(image.height));
                let long = short * most / least.max(1);
                let (width, height) = match image.width <= image.height {
                    true => (short, long),
                    false => (long, short),
                };
                resize(image, width, height, self.filter)?
            }
        };
        let Some(size) = size else {
            return Ok(image);
        };
        // Half of an odd rest goes below and to the right, and above and to the left where the
        // image is too small.
        let offset = |have: usize, want: usize| (have as isize - want as isize).div_euclid(2);
        let left = offset(image.width, size.width);
        let top = offset(image.height, size.height);
        Ok(tiles::crop(&image, left, top, size))
    }

    /// The whole view, then the tiles of the best resolution.
    fn whole_and_tiles(
        &self,
        image: &RgbImage,
        resolutions: &[Size],
    ) -> Result<(Vec<RgbImage>, Tiling)> {
        let size = Size {
            height: image.height,
            width: image.width,
        };
        let target = best_resolution(size, resolutions).ok_or_else(|| Error::Invalid {
            what: format!("image of {}x{} pixels", image.width, image.height),
            why: "none of image_grid_pinpoints keeps anything of it".into(),
        })?;
        let within = size_within(size, target);
        let resized = resize(image, within.width, within.height, self.filter)?;
        let padded = tiles::on_canvas(&resized, target, [0; 3]);
        let mut views = vec![self.to_square(image)?];
        views.extend(tiles::cut(&padded, self.tile));
        let tiling = Tiling {
            rows: target.height / self.tile,
            cols: target.width / self.tile,
            height: size.height,
            width: size.width,
        };
        Ok((views, tiling))
    }

    fn input(
        &self,
        views: &[RgbImage],
        tiling: Option<Tiling>,
        n_more: usize,
    ) -> Result<VisionInput> {
        let (rows, cols) = tiles::grid_of(views, self.patch);
        Ok(VisionInput {
            patches: tiles::patches(views, self.patch, &self.values)?,
            grid_thw: [views.len(), rows, cols],
            n_tokens: rows * cols + usize::from(self.keeps_class) + n_more,
            tiling,
        })
    }
}

impl ImageProcessor for LlavaImages {
    fn vision_input(&self, image: &RgbImage, n_images: usize) -> Result<VisionInput> {
        image.check()?;
        match &self.views {
            Views::Centre { resized, crop } => {
                let view = self.centre(image, *resized, *crop)?;
                self.input(&[view], None, 0)
            }
            Views::Tiles {
                only_alone: Some(colour),
                ..
            } if n_images != 1 => {
                let side = image.width.max(image.height);
                let size = Size {
                    height: side,
                    width: side,
                };
                let view = self.to_square(&tiles::on_canvas(image, size, *colour))?;
                self.input(&[view], None, 1)
            }
            Views::Tiles {
                resolutions,
                packing,
                ..
            } => {
                let (views, tiling) = self.whole_and_tiles(image, resolutions)?;
                self.input(&views, Some(tiling), packing.of(&tiling).n_tokens())
            }
        }
    }

    fn placeholder(&self) -> &str {
        &self.image_token
    }

    fn image_token(&self) -> &str {
        &self.image_token
    }

    /// A centre that is cut out is not all, and a canvas is more.
    fn shows_whole_image(&self) -> bool {
        matches!(self.views, Views::Centre { crop: None, .. })
    }
}

fn packing(tile: usize, tower: TowerSettings, max_tiles: Option<usize>) -> Packing {
    Packing {
        side: tile / tower.patch.max(1),
        max_tiles,
    }
}

/// The number in `anyres_max_N`.
fn max_tiles(settings: &ImageSettings) -> Result<usize> {
    let named = [&settings.processor, &settings.model]
        .into_iter()
        .find_map(|value| value["vision_aspect_ratio"].as_str());
    max_tiles_of(named.unwrap_or("anyres_max_9"))
}

/// The number in `anyres_max_N`.
///
/// # Errors
/// [`Error::Unsupported`] if there is none.
pub fn max_tiles_of(vision_aspect_ratio: &str) -> Result<usize> {
    let number = vision_aspect_ratio.strip_prefix("anyres_max_");
    let number = number.and_then(|n| n.parse().ok()).filter(|n| *n > 0);
    number.ok_or_else(|| Error::Unsupported {
        what: format!("vision_aspect_ratio {vision_aspect_ratio:?}; anyres_max_N is implemented"),
    })
}

/// A side under `key`: a number, `shortest_edge`, or equal `height` and `width`.
fn side(settings: &Settings, key: &str, default: usize) -> Result<usize> {
    let inner = Settings {
        path: settings.path,
        value: &settings.value[key],
    };
    match &settings.value[key] {
        value if value.is_object() && !value["shortest_edge"].is_null() => {
            inner.integer("shortest_edge", default, MAX_SIDE)
        }
        value if value.is_object() => Ok(square(settings, key, default)?.height),
        _ => settings.integer(key, default, MAX_SIDE),
    }
}

/// Equal `height` and `width` under `key`, or one number for both.
fn square(settings: &Settings, key: &str, default: usize) -> Result<Size> {
    let value = &settings.value[key];
    let inner = Settings {
        path: settings.path,
        value,
    };
    let [height, width] = match value.is_object() {
        true => [
            inner.integer("height", default, MAX_SIDE)?,
            inner.integer("width", default, MAX_SIDE)?,
        ],
        false => [settings.integer(key, default, MAX_SIDE)?; 2],
    };
    match height == width {
        true => Ok(Size { height, width }),
        false => Err(settings.bad(key, "equal height and width")),
    }
}

/// `image_grid_pinpoints`: pairs of height and width.
fn resolutions(settings: &Settings) -> Result<Vec<Size>> {
    let key = "image_grid_pinpoints";
    let side = |value: &serde_json::Value| {
        let side = value.as_u64().map(|n| n as usize);
        side.filter(|n| (1..=MAX_SIDE).contains(n))
    };
    let pair = |value: &serde_json::Value| {
        let pair = value.as_array().filter(|pair| pair.len() == 2)?;
        Some(Size {
            height: side(&pair[0])?,
            width: side(&pair[1])?,
        })
    };
    let list = settings.value[key].as_array();
    let found: Option<Vec<Size>> = list.and_then(|list| list.iter().map(pair).collect());
    let found = found.filter(|list| !list.is_empty());
    found.ok_or_else(|| settings.bad(key, "a list of [height, width] in pixels"))
}
