// Package relay (plumbing) copies bytes between two TCP connections until both directions have ended. Half close is
// passed on as half close, a reset as a reset; every live relay can be cut from outside and read for its byte counts.
package relay

// Result is how a relayed connection ended. It is given once, when both directions are done.
type Result struct {
	Sent     int64 // application bytes from the first side (the application, Splice's a) to the second
	Received int64 // application bytes from the second side to the first
	Err      error // nil when both directions ended with an orderly close
	Reset    bool  // one end or the other reset the connection; the reset was passed on
}
