package wire

import (
	"fmt"

	"google.golang.org/protobuf/types/known/anypb"

	"github.com/fairlead-mesh/fairlead/api/security"
	"github.com/fairlead-mesh/fairlead/api/workload"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// UnpackAddress reads the body of a resource of AddressType; without an error exactly one of the two results is not nil.
func UnpackAddress(body *anypb.Any) (*mesh.Workload, *mesh.Service, error) {
	var a workload.Address
	if err := body.UnmarshalTo(&a); err != nil {
		return nil, nil, fmt.Errorf("unpack address: %w", err)
	}
	return DecodeAddress(&a)
}

// UnpackAuthorization reads the body of a resource of AuthorizationType.
func UnpackAuthorization(body *anypb.Any) (*mesh.Authorization, error) {
	var a security.Authorization
	if err := body.UnmarshalTo(&a); err != nil {
		return nil, fmt.Errorf("unpack authorization: %w", err)
	}
	return DecodeAuthorization(&a)
}
