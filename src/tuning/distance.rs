//! How far the student's next tokens are from the teacher's.

use crate::Result;
use crate::importance::end_loss::{Loss, in_pieces, sum};
use crate::model::Head;
use candle_core::{D, Tensor};
use candle_nn::ops::log_softmax;

/// KL(teacher ‖ student), summed over places, and its gradient with respect to the student's last
/// states; both are `[n_places, hidden]`. At the logits the gradient is softmax − teacher's.
///
/// # Errors
/// A tensor error if shapes disagree.
pub(super) fn divergence(head: &Head, teacher: &Tensor, student: &Tensor) -> Result<Loss> {
    in_pieces(student, |rows, start| {
        let log_p = log_softmax(
            &head.logits(&teacher.narrow(0, start, rows.dim(0)?)?)?,
            D::Minus1,
        )?;
        let log_q = log_softmax(&head.logits(rows)?, D::Minus1)?;
        let p = log_p.exp()?;
        let kl = sum(&(&p * (log_p - &log_q)?)?)?;
        let d = (log_q.exp()? - p)?;
        Ok((kl, head.backward(rows, &d)?))
    })
}
