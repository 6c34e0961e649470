// Package tlsrecord (protocols) is the data phase of TLS 1.3 (RFC 8446 §5) without I/O: it seals and opens records in
// place, in buffers that the caller reads from and writes to sockets. crypto/tls does the handshake; Handshake takes over
// from it at the exact record. Key updates, alerts, session tickets of the peer and the limits of the keys are kept here.
package tlsrecord

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

const (
	headerLen = 5
	maxRecord = MaxPlain + 256 // of what the header's length may say

	typeAlert     = 21
	typeHandshake = 22
	typeData      = 23

	messageTicket    = 4
	messageKeyUpdate = 24

	maxMessage = 64 << 10 // of a post-handshake message, bytes
	maxUseless = 32       // records in a row that carry no data
)

// A record in a buffer is HeaderLen bytes, up to MaxPlain bytes of data, TailLen bytes.
const (
	HeaderLen = headerLen
	MaxPlain  = 16384
	TailLen   = 1 + 16 // content type and authentication tag
)

// AlertError is a fatal alert, RFC 8446 §6: from the peer, or (Local) the one that this side owes it.
type AlertError struct {
	Alert tls.AlertError
	Local bool
}

func (e *AlertError) Error() string {
	if e.Local {
		return e.Alert.Error()
	}
	return "remote error: " + e.Alert.Error()
}

func (e *AlertError) Unwrap() error { return e.Alert }

// Alerts that this package sends.
const (
	alertCloseNotify       = 0
	alertUnexpectedMessage = 10
	alertBadRecordMAC      = 20
	alertRecordOverflow    = 22
	alertDecodeError       = 50
	alertInternalError     = 80
)

func local(alert uint8) error { return &AlertError{Alert: tls.AlertError(alert), Local: true} }

// Conn is one side of a connection after its handshake. One goroutine at a time uses it.
type Conn struct {
	in, out half
	message []byte // post-handshake message being collected
	useless int
	owed    bool // the peer asked for a key update
	final   error
}

// New makes a Conn of the handshake's traffic secrets, which it owns and clears.
func New(suite uint16, in, out []byte) (*Conn, error) {
	c := &Conn{}
	if err := c.in.init(suite, in); err != nil {
		return nil, err
	}
	return c, c.out.init(suite, out)
}

// Suite is the TLS 1.3 cipher suite.
func (c *Conn) Suite() uint16 { return c.in.suite.id }

// Length is the length of the record at the front of b with its header: 0 when b is too short to tell. An error is final.
func (c *Conn) Length(b []byte) (int, error) {
	if len(b) < headerLen {
		return 0, nil
	}
	n := int(binary.BigEndian.Uint16(b[3:]))
	if n > maxRecord {
		return 0, c.fail(alertRecordOverflow)
	}
	return headerLen + n, nil
}

// Open decrypts one whole record in place and returns its application data, which lies in rec; nil for other records.
// io.EOF is the peer's close_notify. Other errors are final too: an *AlertError, whose alert AppendAlert puts in a record.
func (c *Conn) Open(rec []byte) ([]byte, error) {
	if c.final != nil {
		return nil, c.final
	}
	if rec[0] != typeData {
		return nil, c.fail(alertUnexpectedMessage)
	}
	if len(rec) < headerLen+TailLen {
		return nil, c.fail(alertDecodeError)
	}
	p, ok := c.in.open(rec)
	if !ok {
		return nil, c.fail(alertBadRecordMAC)
	}
	i := len(p) - 1
	for i >= 0 && p[i] == 0 { // padding
		i--
	}
	if i < 0 {
		return nil, c.fail(alertUnexpectedMessage)
	}
	if i > MaxPlain {
		return nil, c.fail(alertRecordOverflow)
	}
	typ, p := p[i], p[:i]
	if typ == typeData && len(p) > 0 {
		if c.message != nil {
			return nil, c.fail(alertUnexpectedMessage) // a handshake message was left unfinished
		}
		c.useless = 0
		return p, nil
	}
	if c.useless++; c.useless > maxUseless {
		return nil, c.fail(alertUnexpectedMessage)
	}
	switch typ {
	case typeData:
		return nil, nil
	case typeAlert:
		return nil, c.alert(p)
	case typeHandshake:
		return nil, c.handshake(p)
	}
	return nil, c.fail(alertUnexpectedMessage)
}

func (c *Conn) fail(alert uint8) error {
	if c.final == nil {
		c.final = local(alert)
	}
	return c.final
}

func (c *Conn) alert(p []byte) error {
	if len(p) != 2 {
		return c.fail(alertDecodeError)
	}
	if p[1] == alertCloseNotify {
		c.final = io.EOF
	} else {
		c.final = &AlertError{Alert: tls.AlertError(p[1])}
	}
	return c.final
}

// handshake collects post-handshake messages: tickets are skipped, key updates done.
func (c *Conn) handshake(p []byte) error {
	if len(p) == 0 {
		return c.fail(alertUnexpectedMessage)
	}
	c.message = append(c.message, p...)
	for len(c.message) >= 4 {
		n := 4 + int(c.message[1])<<16 + int(c.message[2])<<8 + int(c.message[3])
		if n > maxMessage {
			return c.fail(alertDecodeError)
		}
		if len(c.message) < n {
			return nil
		}
		m := c.message[:n]
		c.message = c.message[n:]
		switch m[0] {
		case messageTicket:
		case messageKeyUpdate:
			if n != 5 || m[4] > 1 {
				return c.fail(alertDecodeError)
			}
			if len(c.message) > 0 { // the new key begins with a new record
				return c.fail(alertUnexpectedMessage)
			}
			if err := c.in.update(); err != nil {
				return c.fail(alertInternalError)
			}
			c.owed = c.owed || m[4] == 1
		default:
			return c.fail(alertUnexpectedMessage)
		}
	}
	if len(c.message) == 0 {
		c.message = nil
	}
	return nil
}

// Seal encrypts in place a record whose n bytes of data (1 to MaxPlain) lie at buf[HeaderLen:]; it is then
// buf[:HeaderLen+n+TailLen]. UpdateDue must be asked before.
func (c *Conn) Seal(buf []byte, n int) { c.out.seal(buf, n, typeData) }

// UpdateDue says that AppendKeyUpdate must be sent before the next Seal: the peer asked for it, or the sending key has
// protected as many records as it should.
func (c *Conn) UpdateDue() bool { return c.owed || c.out.seq >= c.out.suite.limit }

// ControlLen is how many bytes AppendKeyUpdate or AppendAlert adds at most.
const ControlLen = headerLen + 5 + TailLen

// AppendKeyUpdate appends the record that announces a new sending key, and changes to it; ask says that the peer shall do
// the same.
func (c *Conn) AppendKeyUpdate(b []byte, ask bool) ([]byte, error) {
	message := []byte{messageKeyUpdate, 0, 0, 1, 0}
	if ask {
		message[4] = 1
	}
	b = c.appendRecord(b, typeHandshake, message)
	c.owed = false
	if err := c.out.update(); err != nil {
		return b, fmt.Errorf("update the sending key: %w", err)
	}
	return b, nil
}

// AppendAlert appends the alert that belongs to err: what this side found wrong, or close_notify. Nothing is sent after it.
func (c *Conn) AppendAlert(b []byte, err error) []byte {
	level, alert := byte(1), uint8(alertCloseNotify)
	var own *AlertError
	if errors.As(err, &own) && own.Local {
		level, alert = 2, uint8(own.Alert)
	}
	return c.appendRecord(b, typeAlert, []byte{level, alert})
}

func (c *Conn) appendRecord(b []byte, typ byte, p []byte) []byte {
	at := len(b)
	b = append(b, make([]byte, headerLen+len(p)+TailLen)...)
	copy(b[at+headerLen:], p)
	c.out.seal(b[at:], len(p), typ)
	return b
}

// Clear overwrites the secrets. The Conn is of no use afterwards.
func (c *Conn) Clear() {
	clear(c.in.secret)
	clear(c.out.secret)
	c.in.aead, c.out.aead = nil, nil
	if c.final == nil {
		c.final = io.ErrClosedPipe
	}
}
