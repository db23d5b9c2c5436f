//! `ringpass serve` and `vhost-user-ringpass` as a user starts them: the conventions for vhost-user back-end programs,
//! failures of the start-up, and the behaviour towards front-ends.

mod front_ends;
mod program;
mod start;
