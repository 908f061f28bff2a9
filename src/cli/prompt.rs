//! One prompt from flags: images first, then the text.

use crate::dataset::ImageSource;
use crate::processor::chat::{ContentPart, Message, Role};
use crate::processor::{ModelInput, Processor, VisionInput};
use std::path::PathBuf;
use std::sync::Arc;

#[derive(clap::Args)]
pub struct PromptArgs {
    /// Image file; repeat it for several
    #[arg(long, value_name = "FILE")]
    pub image: Vec<PathBuf>,
    /// Text that follows the images
    #[arg(long, value_name = "TEXT")]
    pub prompt: String,
}

impl PromptArgs {
    /// The user's message: all images, then the text.
    fn message(&self) -> Message {
        let images = self.image.iter().map(|_| ContentPart::Image);
        Message {
            role: Role::User,
            content: images
                .chain([ContentPart::Text(self.prompt.clone())])
                .collect(),
        }
    }

    /// The prompt as the model takes it.
    pub fn encode(&self, processor: &Processor) -> crate::Result<ModelInput> {
        processor.encode_prompt(&[self.message()], &self.images(processor)?)
    }

    /// The prompt with an answer.
    pub fn encode_answered(
        &self,
        processor: &Processor,
        answer: &str,
    ) -> crate::Result<ModelInput> {
        let answer = Message {
            role: Role::Assistant,
            content: vec![ContentPart::Text(answer.into())],
        };
        processor.encode_conversation(&[self.message(), answer], &self.images(processor)?)
    }

    fn images(&self, processor: &Processor) -> crate::Result<Vec<Arc<VisionInput>>> {
        let images = self.image.iter().map(|path| {
            let image = ImageSource::File(path.clone()).load()?;
            processor
                .vision_input(&image, self.image.len())
                .map(Arc::new)
        });
        images.collect()
    }
}
