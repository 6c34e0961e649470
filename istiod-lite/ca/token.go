package ca

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/fairlead-mesh/fairlead/internal/identity"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

const (
	// Audience is that of the tokens proxies bring.
	Audience = "istio-ca"
	// reviewLifetime is how long a review's answer is believed: a node proxy asks for many certificates at once.
	reviewLifetime = 30 * time.Second
	// reviewsKept bounds the answers in memory.
	reviewsKept = 4096
)

// TokenReview authenticates callers by their service-account token, at the API server.
type TokenReview struct {
	client      kubernetes.Interface
	trustDomain string

	mu    sync.Mutex
	known map[[sha256.Size]byte]review
}

type review struct {
	caller identity.Caller
	until  time.Time
}

// NewTokenReview makes an identity.Authenticator.
func NewTokenReview(client kubernetes.Interface, trustDomain string) *TokenReview {
	return &TokenReview{client: client, trustDomain: trustDomain, known: map[[sha256.Size]byte]review{}}
}

// Authenticate reviews the request's bearer token.
func (t *TokenReview) Authenticate(ctx context.Context) (identity.Caller, error) {
	token, err := identity.BearerToken(ctx)
	if err != nil {
		return identity.Caller{}, err
	}
	digest := sha256.Sum256([]byte(token))
	t.mu.Lock()
	r, ok := t.known[digest]
	t.mu.Unlock()
	if ok && time.Now().Before(r.until) {
		return r.caller, nil
	}
	answer, err := t.client.AuthenticationV1().TokenReviews().Create(ctx, &authenticationv1.TokenReview{
		Spec: authenticationv1.TokenReviewSpec{Token: token, Audiences: []string{Audience}},
	}, metav1.CreateOptions{})
	if err != nil {
		return identity.Caller{}, fmt.Errorf("review token: %w", err)
	}
	caller, err := t.caller(answer.Status)
	if err != nil {
		return identity.Caller{}, fmt.Errorf("review token: %w", err)
	}
	t.remember(digest, caller)
	return caller, nil
}

func (t *TokenReview) remember(digest [sha256.Size]byte, caller identity.Caller) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.known) >= reviewsKept {
		clear(t.known)
	}
	t.known[digest] = review{caller: caller, until: time.Now().Add(reviewLifetime)}
}

// caller reads the answer: the user name is system:serviceaccount:<namespace>:<name>, what the token is bound to is in
// the extra fields.
func (t *TokenReview) caller(s authenticationv1.TokenReviewStatus) (identity.Caller, error) {
	if !s.Authenticated {
		return identity.Caller{}, fmt.Errorf("not authenticated: %s", s.Error)
	}
	if !slices.Contains(s.Audiences, Audience) {
		return identity.Caller{}, fmt.Errorf("audiences %v: want %s", s.Audiences, Audience)
	}
	parts := strings.Split(s.User.Username, ":")
	if len(parts) != 4 || parts[0] != "system" || parts[1] != "serviceaccount" {
		return identity.Caller{}, fmt.Errorf("%q is not a service account", s.User.Username)
	}
	extra := func(name string) string {
		if v := s.User.Extra["authentication.kubernetes.io/"+name]; len(v) > 0 {
			return v[0]
		}
		return ""
	}
	return identity.Caller{
		Identity: mesh.Identity{TrustDomain: t.trustDomain, Namespace: parts[2], ServiceAccount: parts[3]},
		PodName:  extra("pod-name"), PodUID: extra("pod-uid"), Node: extra("node-name"),
	}, nil
}

// TokenFile authenticates callers by a file of lines "token,namespace/serviceaccount,podname", for a mesh without
// Kubernetes. The file is read at each request; empty lines and those that begin with # say nothing.
type TokenFile struct {
	Path        string
	TrustDomain string
}

// Authenticate finds the request's bearer token in the file.
func (t TokenFile) Authenticate(ctx context.Context) (identity.Caller, error) {
	token, err := identity.BearerToken(ctx)
	if err != nil {
		return identity.Caller{}, err
	}
	text, err := os.ReadFile(t.Path)
	if err != nil {
		return identity.Caller{}, fmt.Errorf("token file: %w", err)
	}
	for i, line := range strings.Split(string(text), "\n") {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		fields := strings.Split(line, ",")
		if len(fields) != 3 {
			return identity.Caller{}, fmt.Errorf("token file %s line %d: want token,namespace/serviceaccount,podname", t.Path, i+1)
		}
		if fields[0] != token {
			continue
		}
		namespace, account, ok := strings.Cut(fields[1], "/")
		if !ok {
			return identity.Caller{}, fmt.Errorf("token file %s line %d: %q is not namespace/serviceaccount", t.Path, i+1, fields[1])
		}
		return identity.Caller{
			Identity: mesh.Identity{TrustDomain: t.TrustDomain, Namespace: namespace, ServiceAccount: account}, PodName: fields[2],
		}, nil
	}
	return identity.Caller{}, errors.New("the token is not in the token file")
}

// Nobody refuses every caller: no way to authenticate was configured.
type Nobody struct{}

// Authenticate always fails.
func (Nobody) Authenticate(context.Context) (identity.Caller, error) {
	return identity.Caller{}, errors.New("no token file was given (--token-auth-file), so that no caller is known")
}
