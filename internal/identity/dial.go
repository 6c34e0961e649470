package identity

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/url"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
)

// ControlPlane is how a proxy reaches its control plane, for xDS and for certificates alike.
type ControlPlane struct {
	// Address is https://host:port, or http://host:port for one on the same machine that needs neither TLS nor token.
	Address string
	// RootFile holds the PEM roots that vouch for the control plane; it is read anew at each handshake. It may be SYSTEM,
	// for the machine's roots, or the PEM text itself.
	RootFile string
	// TokenFile holds the service-account token; it is read anew for each call. Empty: no token is sent.
	TokenFile string
	// ServerName is the name to find in the certificate where it is not Address's host.
	ServerName string
}

// Dial makes a connection, which gRPC opens when it is used and restores when it is lost.
func (p ControlPlane) Dial(context.Context) (*grpc.ClientConn, error) {
	target, err := url.Parse(p.Address)
	if err != nil || target.Host == "" {
		return nil, fmt.Errorf("control plane address %q: want https://host:port", p.Address)
	}
	// Servers of gRPC that were not told otherwise end connections with more than one PING in five minutes, or with any while
	// nothing is asked for (too_many_pings). The kernel's own probes, which no server counts, find one that is gone sooner.
	pings := keepalive.ClientParameters{Time: 5*time.Minute + 10*time.Second, Timeout: 10 * time.Second}
	dialer := net.Dialer{KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 30 * time.Second, Interval: 5 * time.Second, Count: 3}}
	options := []grpc.DialOption{
		grpc.WithNoProxy(),              // the control plane is never behind a proxy of the environment
		grpc.WithDisableServiceConfig(), // which would be asked for as a TXT record, for many seconds where no DNS answers
		grpc.WithKeepaliveParams(pings),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			return dialer.DialContext(ctx, "tcp", address)
		}),
	}
	switch target.Scheme {
	case "http":
		options = append(options, grpc.WithTransportCredentials(insecure.NewCredentials()))
	case "https":
		options = append(options, grpc.WithTransportCredentials(credentials.NewTLS(p.tls(target.Hostname()))))
		if p.TokenFile != "" {
			options = append(options, grpc.WithPerRPCCredentials(tokenFile(p.TokenFile)))
		}
	default:
		return nil, fmt.Errorf("control plane address %q: unknown scheme %q", p.Address, target.Scheme)
	}
	return grpc.NewClient("dns:///"+target.Host, options...)
}

// tls verifies the control plane by the roots in the file as it is at the handshake, so that new roots need no restart.
func (p ControlPlane) tls(host string) *tls.Config {
	name := host
	if p.ServerName != "" {
		name = p.ServerName
	}
	config := &tls.Config{
		MinVersion: tls.VersionTLS12, // Istio's control plane serves 1.2 and 1.3
		// The check below replaces Go's, which would use roots read once.
		InsecureSkipVerify: true,
		VerifyConnection: func(s tls.ConnectionState) error {
			roots, err := p.roots()
			if err != nil {
				return fmt.Errorf("control plane roots: %w", err)
			}
			intermediates := x509.NewCertPool()
			for _, c := range s.PeerCertificates[1:] {
				intermediates.AddCert(c)
			}
			_, err = s.PeerCertificates[0].Verify(x509.VerifyOptions{DNSName: name, Roots: roots, Intermediates: intermediates})
			return err
		},
	}
	if net.ParseIP(name) == nil {
		config.ServerName = name
	}
	return config
}

func (p ControlPlane) roots() (*x509.CertPool, error) {
	if p.RootFile == "SYSTEM" {
		return x509.SystemCertPool()
	}
	text := []byte(p.RootFile)
	if !strings.Contains(p.RootFile, "-----BEGIN ") {
		var err error
		if text, err = os.ReadFile(p.RootFile); err != nil {
			return nil, err
		}
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(text) {
		return nil, fmt.Errorf("no certificate in %s", p.RootFile)
	}
	return roots, nil
}

// tokenFile sends a file's token with each call.
type tokenFile string

func (f tokenFile) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	token, err := os.ReadFile(string(f))
	if err != nil {
		return nil, fmt.Errorf("service-account token: %w", err)
	}
	return map[string]string{authorizationHeader: bearer + strings.TrimSpace(string(token))}, nil
}

func (tokenFile) RequireTransportSecurity() bool { return true }
