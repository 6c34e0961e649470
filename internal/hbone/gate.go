package hbone

import (
	"crypto/tls"
	"net"
)

// gate lets only so many handshakes compute at once, so that a flood of them leaves processors to the loops: then those
// that shake hands wait, and not those whose tunnels stand. Waiting for the peer or for a certificate takes no place.
type gate chan struct{}

func (g gate) enter() { g <- struct{}{} }
func (g gate) leave() { <-g }

// config is cfg with its wait for a certificate outside of the gate.
func (g gate) config(cfg *tls.Config) *tls.Config {
	choose := cfg.GetConfigForClient
	if choose == nil {
		return cfg
	}
	cfg = cfg.Clone()
	cfg.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		g.leave()
		defer g.enter()
		return choose(hello)
	}
	return cfg
}

// gatedConn is a connection whose owner is inside of the gate, except while it waits for bytes.
type gatedConn struct {
	net.Conn
	g gate
}

func (c gatedConn) Read(b []byte) (int, error) {
	c.g.leave()
	defer c.g.enter()
	return c.Conn.Read(b)
}
