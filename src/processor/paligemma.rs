//! The image side of PaliGemma, and its prompt: images brought to one square, all of them before
//! the question, and a first token between the two. Folders have no chat template; the one here
//! writes what the family was trained with.
//!
//! Source: arXiv:2407.07726 §3.2; transformers 5.23 `SiglipImageProcessorPil`,
//! `PaliGemmaProcessor`.

use crate::processor::image::RgbImage;
use crate::processor::llava::{LlavaImages, TowerSettings};
use crate::processor::{ImageProcessor, ImageSettings, VisionInput};
use crate::{Error, Result};
use serde_json::json;

/// One question about images and perhaps its answer, as a template: the tokens of the images, the
/// first token, the question, a line break, the answer and the end token.
const TEMPLATE: &str = "\
    {% set known = messages[0]['role'] == 'user' and messages | length < 3 %}\
    {% if not known or (messages | length == 2 and messages[1]['role'] != 'assistant') %}\
    {{ raise_exception('PaliGemma takes one question and one answer, and no system message') }}\
    {% endif %}\
    {% set question = messages[0]['content'] %}\
    {% for c in question %}{% if c['type'] == 'image' %}<image>{% endif %}{% endfor %}\
    {{ bos_token }}\
    {% for c in question %}{% if 'text' in c %}{{ c['text'] }}{% endif %}{% endfor %}\
    {{ '\\n' }}\
    {% for m in messages[1:] %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}\
    {{ eos_token }}{% endfor %}";

/// The image settings of one checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct PaliGemmaImages {
    view: LlavaImages,
}

impl PaliGemmaImages {
    /// The settings of a checkpoint whose tower has patches of `patch`² pixels.
    ///
    /// # Errors
    /// As [`LlavaImages::single`]; [`Error::Unsupported`] for an image token that is not `<image>`.
    pub fn open(settings: &ImageSettings, patch: usize) -> Result<Self> {
        let mut settings = settings.clone();
        // SigLIP's mean and deviation, where the settings name none.
        for key in ["image_mean", "image_std"] {
            if settings.images.is_object() && settings.images[key].is_null() {
                settings.images[key] = json!([0.5, 0.5, 0.5]);
            }
        }
        let tower = TowerSettings {
            patch,
            keeps_class: false,
        };
        let view = LlavaImages::single(&settings, tower)?;
        match view.image_token() {
            "<image>" => Ok(Self { view }),
            other => Err(Error::Unsupported {
                what: format!(
                    "{}: image_token {other:?}; <image> is implemented",
                    settings.path.display()
                ),
            }),
        }
    }
}

impl ImageProcessor for PaliGemmaImages {
    fn vision_input(&self, image: &RgbImage, n_images: usize) -> Result<VisionInput> {
        self.view.vision_input(image, n_images)
    }

    fn placeholder(&self) -> &str {
        self.view.placeholder()
    }

    fn image_token(&self) -> &str {
        self.view.image_token()
    }

    fn template(&self) -> Option<&str> {
        Some(TEMPLATE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::processor::chat::{ChatTemplate, Rendered};
    use crate::processor::{ContentPart, Message, Role};

    fn rendered(messages: &[Message]) -> Result<Rendered> {
        let tokens = json!({"bos_token": "<bos>", "eos_token": "<eos>"});
        let template = ChatTemplate::new("t", TEMPLATE, tokens.as_object().unwrap().clone());
        template.unwrap().render_spans(messages, true)
    }

    #[test]
    fn images_come_first_and_the_question_ends_with_a_line_break() {
        let question = Message {
            role: Role::User,
            content: vec![
                ContentPart::Image,
                ContentPart::Text("answer en where?".into()),
                ContentPart::Image,
            ],
        };
        let prompt = "<image><image><bos>answer en where?\n";
        let answered = [question.clone(), Message::text(Role::Assistant, "here")];
        assert_eq!(rendered(&answered[..1]).unwrap().text, prompt);
        let whole = rendered(&answered).unwrap();
        assert_eq!(whole.text, format!("{prompt}here<eos>"));
        let answer = whole.spans.last().unwrap();
        assert_eq!(answer.role, Role::Assistant);
        assert_eq!(&whole.text[answer.bytes.clone()], "here");
        let more = [&answered[..], &answered[..1]].concat();
        for wrong in [more, vec![question.clone(), question]] {
            let message = rendered(&wrong).unwrap_err().to_string();
            assert!(message.contains("one question"), "{message}");
        }
    }
}
