package hbone

import (
	"crypto/tls"
	"net"
	"testing"
)

// TestGateIsFreeForOthersInWaits: who waits for the peer's bytes, or for a certificate, keeps nobody else out, and is
// inside again afterwards.
func TestGateIsFreeForOthersInWaits(t *testing.T) {
	free := func(g gate) bool {
		select {
		case g <- struct{}{}:
			g.leave()
			return true
		default:
			return false
		}
	}
	g := make(gate, 1)
	g.enter()
	defer g.leave()
	if free(g) {
		t.Fatal("the gate lets more in than it should")
	}
	var during bool
	cfg := g.config(&tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
		during = free(g)
		return nil, nil
	}})
	if _, err := cfg.GetConfigForClient(nil); err != nil || !during || free(g) {
		t.Errorf("certificate: %v, free meanwhile %v, afterwards %v", err, during, free(g))
	}
	a, b := net.Pipe()
	defer b.Close()
	go func() {
		during = free(g)
		a.Write([]byte("x"))
	}()
	if _, err := (gatedConn{b, g}).Read(make([]byte, 1)); err != nil || !during || free(g) {
		t.Errorf("bytes: %v, free meanwhile %v, afterwards %v", err, during, free(g))
	}
}
