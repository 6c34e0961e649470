package identity

// The server's steps:
//  1. Who calls (Authenticator: the token, or the client certificate).
//  2. What is asked: a signing request that proves its key; whose certificate.
//  3. May the caller have it (Authorizer: itself always; another only as a node proxy for a pod of its node).
//  4. Sign (Authority), the leaf first and the root last in the reply.
//
// Next: istiod-lite/ca.

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"time"

	"go.uber.org/zap"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	ca "istio.io/api/security/v1alpha1"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

const (
	authorizationHeader = "authorization"
	bearer              = "Bearer "
)

// Caller is who asks the certificate service, as its token or certificate says.
type Caller struct {
	Identity mesh.Identity
	// PodName and PodUID are those of the pod the token is bound to; empty where it is bound to none.
	PodName string
	PodUID  string
	// Node is the node the token is bound to, where the API server says.
	Node string
}

// Authenticator finds out who calls.
type Authenticator interface {
	Authenticate(ctx context.Context) (Caller, error)
}

// Authorizer says whether a caller may have the certificate of another identity; nil allows. It is not asked about the
// caller's own.
type Authorizer interface {
	Authorize(ctx context.Context, caller Caller, wanted mesh.Identity) error
}

// Authority signs. The chain is PEM, one certificate an element, leaf first, root last (the last element may hold
// several roots). Of the request it uses the public key only.
type Authority interface {
	Sign(csr *x509.CertificateRequest, id mesh.Identity, ttl time.Duration) (chain []string, err error)
}

// ServerConfig is what a certificate service needs.
type ServerConfig struct {
	Authenticator Authenticator
	Authorizer    Authorizer
	Authority     Authority
	// DefaultTTL is given where none is asked for (0: 24 hours); more than MaxTTL is cut to it (0: 24 hours).
	DefaultTTL time.Duration
	MaxTTL     time.Duration
	Log        *zap.Logger
}

// Server is the certificate service; register it with ca.RegisterIstioCertificateServiceServer of
// istio.io/api/security/v1alpha1.
type Server struct {
	ca.UnimplementedIstioCertificateServiceServer
	cfg ServerConfig
}

// NewServer makes a certificate service.
func NewServer(cfg ServerConfig) *Server {
	if cfg.DefaultTTL == 0 {
		cfg.DefaultTTL = 24 * time.Hour
	}
	if cfg.MaxTTL == 0 {
		cfg.MaxTTL = 24 * time.Hour
	}
	return &Server{cfg: cfg}
}

// CreateCertificate answers one request. What a caller may know of a refusal is in the error; the log has the rest.
func (s *Server) CreateCertificate(ctx context.Context, request *ca.IstioCertificateRequest) (*ca.IstioCertificateResponse, error) {
	caller, err := s.cfg.Authenticator.Authenticate(ctx)
	if err != nil {
		s.cfg.Log.Warn("certificate request from nobody known", zap.Error(err))
		return nil, status.Error(codes.Unauthenticated, "the caller could not be authenticated")
	}
	wanted, err := wantedIdentity(caller, request)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	csr, err := parseSigningRequest(request.GetCsr())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	if wanted != caller.Identity {
		if err := s.cfg.Authorizer.Authorize(ctx, caller, wanted); err != nil {
			s.cfg.Log.Warn("certificate refused", zap.Stringer("caller", caller.Identity),
				zap.String("pod", caller.PodName), zap.Stringer("wanted", wanted), zap.Error(err))
			return nil, status.Error(codes.PermissionDenied, fmt.Sprintf("%s may not have a certificate of %s: %v", caller.Identity, wanted, err))
		}
	}
	chain, err := s.cfg.Authority.Sign(csr, wanted, s.ttl(request))
	if err != nil {
		s.cfg.Log.Error("sign certificate", zap.Stringer("wanted", wanted), zap.Error(err))
		return nil, status.Error(codes.Internal, "the certificate could not be signed")
	}
	return &ca.IstioCertificateResponse{CertChain: chain}, nil
}

func (s *Server) ttl(request *ca.IstioCertificateRequest) time.Duration {
	seconds := request.GetValidityDuration()
	switch {
	case seconds <= 0:
		return min(s.cfg.DefaultTTL, s.cfg.MaxTTL)
	case seconds > int64(s.cfg.MaxTTL/time.Second):
		return s.cfg.MaxTTL
	default:
		return time.Duration(seconds) * time.Second
	}
}

// wantedIdentity is whose certificate is asked for: the impersonated identity, or the caller's own.
func wantedIdentity(caller Caller, request *ca.IstioCertificateRequest) (mesh.Identity, error) {
	field, ok := request.GetMetadata().GetFields()[impersonatedIdentity]
	if !ok || field.GetStringValue() == "" {
		return caller.Identity, nil
	}
	return mesh.ParseIdentity(field.GetStringValue())
}

// parseSigningRequest reads a PEM signing request and checks that its sender holds the key, and that the key is one
// to rely on.
func parseSigningRequest(text string) (*x509.CertificateRequest, error) {
	block, _ := pem.Decode([]byte(text))
	if block == nil || block.Type != "CERTIFICATE REQUEST" {
		return nil, errors.New("signing request: not a PEM certificate request")
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("signing request: %w", err)
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, fmt.Errorf("signing request: %w", err)
	}
	switch key := csr.PublicKey.(type) {
	case *ecdsa.PublicKey, ed25519.PublicKey:
	case *rsa.PublicKey:
		if key.N.BitLen() < 2048 {
			return nil, fmt.Errorf("signing request: RSA key of %d bits: want 2048 or more", key.N.BitLen())
		}
	default:
		return nil, fmt.Errorf("signing request: key of unsupported type %T", key)
	}
	return csr, nil
}

// BearerToken is the token in the headers of a gRPC request, for Authenticators.
func BearerToken(ctx context.Context) (string, error) {
	headers, _ := metadata.FromIncomingContext(ctx)
	for _, value := range headers.Get(authorizationHeader) {
		if len(value) > len(bearer) && strings.EqualFold(value[:len(bearer)], bearer) {
			return strings.TrimSpace(value[len(bearer):]), nil
		}
	}
	return "", errors.New("no bearer token in the request")
}
