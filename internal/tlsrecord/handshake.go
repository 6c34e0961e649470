package tlsrecord

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
)

// Handshake does the TLS 1.3 handshake on nc by crypto/tls and returns the record layer of what follows, with the bytes
// of it that were read already. nc stays the caller's; after an error it is of no further use. Session tickets are
// neither sent nor used: they would be records that this package has not counted.
func Handshake(ctx context.Context, nc net.Conn, cfg *tls.Config, server bool) (c *Conn, state *tls.ConnectionState, early []byte, err error) {
	rc := &boundaryConn{Conn: nc, buf: make([]byte, 0, maxRecord+4096)}
	keys := &secrets{}
	var tc *tls.Conn
	if server {
		tc = tls.Server(rc, prepared(cfg, keys))
	} else {
		tc = tls.Client(rc, prepared(cfg, keys))
	}
	if err := tc.HandshakeContext(ctx); err != nil {
		return nil, nil, nil, err
	}
	st := tc.ConnectionState()
	if st.Version != tls.VersionTLS13 {
		return nil, nil, nil, errors.New("not TLS 1.3")
	}
	in, out, err := keys.take(server)
	if err != nil {
		return nil, nil, nil, err
	}
	if c, err = New(st.CipherSuite, in, out); err != nil {
		return nil, nil, nil, err
	}
	return c, &st, rc.rest(), nil
}

// prepared is cfg, and whatever cfg chooses for a client's hello, with keys as its key log.
func prepared(cfg *tls.Config, keys *secrets) *tls.Config {
	cfg = cfg.Clone()
	cfg.KeyLogWriter = keys
	cfg.SessionTicketsDisabled = true
	cfg.ClientSessionCache = nil
	if choose := cfg.GetConfigForClient; choose != nil {
		cfg.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			chosen, err := choose(hello)
			if err != nil || chosen == nil {
				return nil, err
			}
			chosen = chosen.Clone()
			chosen.KeyLogWriter = keys
			chosen.SessionTicketsDisabled = true
			return chosen, nil
		}
	}
	return cfg
}

// boundaryConn never gives crypto/tls bytes of two records in one Read, so that nothing of the data phase ends up in its
// buffers. What was read ahead is what rest returns.
type boundaryConn struct {
	net.Conn
	buf  []byte // buf[r:] is read and not given
	r    int
	need int // bytes of the current record not given yet
}

func (c *boundaryConn) Read(p []byte) (int, error) {
	for c.need == 0 {
		if b := c.buf[c.r:]; len(b) >= headerLen {
			n := int(binary.BigEndian.Uint16(b[3:]))
			if n > maxRecord {
				return 0, fmt.Errorf("TLS record of %d bytes", n)
			}
			c.need = headerLen + n
			break
		}
		if err := c.fill(); err != nil {
			return 0, err
		}
	}
	if c.r == len(c.buf) {
		if err := c.fill(); err != nil {
			return 0, err
		}
	}
	n := copy(p[:min(len(p), c.need)], c.buf[c.r:])
	c.r += n
	c.need -= n
	return n, nil
}

// fill reads more; there is always room, since less than a record header is kept when it is called.
func (c *boundaryConn) fill() error {
	n := copy(c.buf[:cap(c.buf)], c.buf[c.r:])
	c.r = 0
	k, err := c.Conn.Read(c.buf[n:cap(c.buf)])
	c.buf = c.buf[:n+k]
	if k > 0 {
		return nil
	}
	return err
}

func (c *boundaryConn) rest() []byte {
	if c.r == len(c.buf) {
		return nil
	}
	return append([]byte(nil), c.buf[c.r:]...)
}
