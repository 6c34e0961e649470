package hbone

import (
	"errors"
	"fmt"
)

var (
	// ErrClosed is returned by calls on a Pool, Server or Stream that this side has closed.
	ErrClosed = errors.New("hbone: closed")
	// ErrAborted is the cause of a stream cut by Stream.Abort(nil).
	ErrAborted = errors.New("hbone: aborted")

	errTooMany = errors.New("hbone: too many tunnels")
)

// DialError says that no TCP connection to the peer proxy could be made. Unwrap gives the error of the Dialer.
type DialError struct{ Err error }

func (e *DialError) Error() string { return "dial peer proxy: " + e.Err.Error() }
func (e *DialError) Unwrap() error { return e.Err }

// TLSError says that the TCP connection stood but the TLS handshake failed, on either side's account (a certificate that
// was refused, a wrong identity, no common version). Unwrap gives the error of crypto/tls.
type TLSError struct{ Err error }

func (e *TLSError) Error() string { return "TLS handshake with peer proxy: " + e.Err.Error() }
func (e *TLSError) Unwrap() error { return e.Err }

// StatusError is the peer's refusal of a CONNECT: an answer that is not 2xx (401 denied by policy, 503 cannot connect).
type StatusError struct {
	Code   int
	Reason string // the details parameter of the answer's proxy-status header (RFC 9209); often empty
}

func (e *StatusError) Error() string {
	if e.Reason == "" {
		return fmt.Sprintf("peer proxy answered %d", e.Code)
	}
	return fmt.Sprintf("peer proxy answered %d: %s", e.Code, e.Reason)
}

// ResetError is the end of a stream by RST_STREAM, from either side; the application behind the peer sees a TCP RST.
// errors.Is(err, syscall.ECONNRESET) holds.
type ResetError struct {
	Code   uint32 // RFC 9113 §7
	Remote bool   // sent by the peer
}

func (e *ResetError) Error() string {
	by := "this side"
	if e.Remote {
		by = "the peer"
	}
	return fmt.Sprintf("stream reset by %s (HTTP/2 error code %d)", by, e.Code)
}

// Is makes a ResetError match the errno that a plain TCP connection would have shown.
func (e *ResetError) Is(target error) bool { return target == errConnReset }

// TunnelError ends every stream of a tunnel whose TCP connection, TLS session or HTTP/2 framing broke.
type TunnelError struct{ Err error }

func (e *TunnelError) Error() string { return "tunnel lost: " + e.Err.Error() }
func (e *TunnelError) Unwrap() error { return e.Err }
