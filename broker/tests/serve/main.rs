//! `ringpass serve` and `vhost-user-ringpass` as a user starts them: the conventions for the programs of vhost-user
//! back-ends, what happens when start-up fails, and what front-ends see of a server.

mod front_ends;
mod program;
mod start;
